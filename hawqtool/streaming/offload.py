"""Hidden states on the device, in the host's memory or on the disk, by size; where they lie changes no value."""

from __future__ import annotations

import hashlib
import io
import itertools
import tempfile
import weakref
from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.errors import ResourceError

DEVICE, HOST, DISK = "device", "host", "disk"

CHUNK_BYTES = 32 << 20
"""Size of every piece of page-locked memory.

Its allocator gives none back and reuses a piece only for one as large: pieces of the batches' own sizes, which differ
from stage to stage, once took 15 GiB where at most 6 held something.
"""

FOLDER_PREFIX = ".hawqtool-states-"
"""What the names of folders with hidden states begin with; one that is left over belongs to a run that was killed."""


@dataclass(frozen=True)
class _File:
    """A file of hidden states, with the SHA-256 of what was written: disks lose bits over the hours of a run."""

    path: Path
    digest: bytes


_Held = Tensor | list[Tensor] | _File
"""On the device; in page-locked chunks, the last of which may be filled in part; in a file."""


class Offload:
    """Puts tensors where there is room, first on the device, then in page-locked host memory, then on the disk.

    On a CPU device and host are one, so ``host_bytes`` is 0 there.

    Args:
        device: Where the tensors are needed.
        device_bytes: Most bytes to keep there.
        host_bytes: Most bytes to keep in the host's memory.
        parent: Folder in which a temporary one is made when the disk is needed; it goes with the offload.

    Attributes:
        peak_bytes: Most bytes that lay in each place at a time.
    """

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int, parent: Path) -> None:
        self.device, self._parent = device, parent
        self._limits = {DEVICE: device_bytes, HOST: host_bytes}
        self._used = {DEVICE: 0, HOST: 0, DISK: 0}
        self.peak_bytes = dict(self._used)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()

    @property
    def device_bytes(self) -> int:
        """Most bytes that are kept on the device."""
        return self._limits[DEVICE]

    def with_device_bytes(self, count: int) -> Offload:
        """An offload of its own with another limit on the device, for a stage in which this one holds nothing."""
        return Offload(self.device, count, self._limits[HOST], self._parent)

    @property
    def memory_bytes(self) -> int:
        """Most bytes that are kept without the disk."""
        return sum(self._limits.values())

    def store(self, tensor: Tensor) -> Offloaded:
        """Keep a tensor; it is let go with the last reference to what is returned.

        Raises:
            ResourceError: If it must go to the disk, which refuses.
        """
        tensor = tensor.detach()
        sizes = {DEVICE: tensor.nbytes, HOST: -(-tensor.nbytes // CHUNK_BYTES) * CHUNK_BYTES}
        place = next((p for p in (DEVICE, HOST) if self._used[p] + sizes[p] <= self._limits[p]), DISK)
        held: _Held = tensor
        if place == HOST:
            held = [_chunk(self.device) for _ in range(sizes[HOST] // CHUNK_BYTES)]
            for chunk, piece in zip(held, _pieces(tensor.contiguous()), strict=True):
                chunk[: len(piece)].copy_(piece, non_blocking=True)
        elif place == DISK:
            held = self._write(tensor)
        size = sizes.get(place, tensor.nbytes)
        self._used[place] += size
        self.peak_bytes[place] = max(self.peak_bytes[place], self._used[place])
        kept = Offloaded(held, tensor.shape, tensor.dtype, self.device)
        weakref.finalize(kept, self._let_go, place, size, held.path if isinstance(held, _File) else None).atexit = False
        return kept

    def reserve(self, count: int) -> object | None:
        """Room on the device for bytes that the caller holds, until the last reference to what is returned is gone.

        Returns:
            None where there is none.
        """
        if self._used[DEVICE] + count > self._limits[DEVICE]:
            return None
        self._used[DEVICE] += count
        self.peak_bytes[DEVICE] = max(self.peak_bytes[DEVICE], self._used[DEVICE])
        room = _Room()
        weakref.finalize(room, self._let_go, DEVICE, count, None).atexit = False
        return room

    def _let_go(self, place: str, size: int, path: Path | None) -> None:
        self._used[place] -= size
        if path is not None:
            path.unlink(missing_ok=True)
        if self._folder is not None and not self._used[DISK]:
            self._folder.cleanup()
            self._folder = None

    def _write(self, tensor: Tensor) -> _File:
        digest = hashlib.sha256()
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, dir=self._parent)
            path = Path(self._folder.name) / str(next(self._numbers))
            with path.open("wb", buffering=0) as stream:
                for piece in _pieces(tensor.cpu().contiguous()):
                    left = piece.numpy().data
                    digest.update(left)
                    while len(left):
                        left = left[stream.write(left) :]
        except OSError as error:
            raise ResourceError(
                f"hidden states do not fit into memory, and {self._parent} refuses them ({error.strerror or error}); "
                "free some space there, raise --max-memory, or lower --num-samples"
            ) from error
        return _File(path, digest.digest())


class _Room:
    """Stands for bytes that somebody else holds."""


class Offloaded:
    """A tensor that a offload keeps."""

    def __init__(self, held: _Held, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._held, self._shape, self._dtype, self._device = held, shape, dtype, device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, wherever it lies."""
        return self._shape.numel() * self._dtype.itemsize

    def load(self) -> Tensor:
        """The tensor, on the offload's device.

        Raises:
            ResourceError: If its file cannot be read, or differs from its checksum.
        """
        if isinstance(self._held, Tensor):
            return self._held
        found = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        chunks = self._read(self._held) if isinstance(self._held, _File) else self._held
        for piece, chunk in zip(_pieces(found), chunks, strict=True):
            piece.copy_(chunk[: len(piece)], non_blocking=True)
        return found

    def _read(self, file: _File) -> Iterator[Tensor]:
        """The content of a file in chunks, the last of which may be filled in part; it comes when all are right."""
        digest = hashlib.sha256()
        try:
            with file.path.open("rb", buffering=0) as stream:
                for start in range(0, self.nbytes, CHUNK_BYTES):
                    chunk = _chunk(self._device)
                    content = chunk.numpy().data[: self.nbytes - start]
                    _fill(stream, content)
                    digest.update(content)
                    if start + CHUNK_BYTES >= self.nbytes and digest.digest() != file.digest:
                        raise OSError("they differ from their checksum")
                    yield chunk
        except OSError as error:
            raise ResourceError(
                f"hidden states in {file.path.parent} cannot be read back ({error.strerror or error}); check the disk"
            ) from error


def _fill(stream: io.FileIO, target: memoryview) -> None:
    while len(target):
        count = stream.readinto(target)
        if not count:
            raise OSError("the file ended early")
        target = target[count:]


def _chunk(device: torch.device) -> Tensor:
    return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """The bytes of a contiguous tensor, piece by piece; none of an empty one."""
    return tensor.view(-1).view(torch.uint8).split(CHUNK_BYTES) if tensor.nbytes else ()


class OffloadedBatches(MutableSequence[Tensor]):
    """Offloaded tensors as a sequence; a copy shares what it holds until entries are replaced.

    Args:
        offload: Keeps them.
        tensors: The first entries.
    """

    def __init__(self, offload: Offload, tensors: Iterable[Tensor] = ()) -> None:
        self._shelf = offload
        self._kept: list[Offloaded | None] = [offload.store(tensor) for tensor in tensors]

    def __copy__(self) -> OffloadedBatches:
        other = OffloadedBatches(self._shelf)
        other._kept = list(self._kept)
        return other

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries; none of them is read for it."""
        return sum(kept.nbytes for kept in self._kept if kept is not None)

    def __getitem__(self, index: Any) -> Any:
        kept = self._kept[index]
        assert isinstance(kept, Offloaded)  # slices of the sequence are not needed anywhere
        return kept.load()

    def __setitem__(self, index: Any, value: Any) -> None:
        self._kept[index] = None  # first makes room, which the new one can take
        self._kept[index] = self._shelf.store(value)

    def __delitem__(self, index: Any) -> None:
        del self._kept[index]

    def insert(self, index: int, value: Tensor) -> None:
        """Insert a tensor before an index."""
        self._kept.insert(index, self._shelf.store(value))


def total_bytes(states: Sequence[Tensor]) -> int:
    """Bytes of hidden states, which are not read where they are offloaded."""
    return states.nbytes if isinstance(states, OffloadedBatches) else sum(state.nbytes for state in states)


@dataclass(frozen=True)
class StreamMemory:
    """Where a stream keeps what is no block's.

    Args:
        offload: Keeps the hidden states between blocks; None keeps all of them on the device.
        matrices: Loaded matrices outside the blocks by stored name, which streams of one dtype share while one of them
            lives: an embedding may be larger than a block. Nothing may change them. None where nothing is shared.
        owns: Whether those are of this stream's source; else each is compared before it is taken.
    """

    offload: Offload | None = None
    matrices: MutableMapping[str, nn.Parameter] | None = None
    owns: bool = True
