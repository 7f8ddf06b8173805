"""Writing the packed checkpoint: tensors stream into files of known size, in any order."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from hawqtool.checkpoint.companions import companion_files
from hawqtool.checkpoint.dtypes import dtype_name
from hawqtool.checkpoint.index import INDEX_FILE, CheckpointIndex, read_header
from hawqtool.checkpoint.originals.declaration import without_quantization
from hawqtool.checkpoint.reader import CHUNK_BYTES, TensorReader
from hawqtool.errors import InputError, NumericalError, disk_errors
from hawqtool.export.layout import Entry, Layout
from hawqtool.export.stored.weights import packed_tensors
from hawqtool.parsing import ParseError, load_json
from hawqtool.records import RoundedLayer
from hawqtool.runtime.background import beside

UNTIED = "tie_word_embeddings"
"""Key of ``config.json`` that is false where a rotation has given the head a weight of its own."""


class CheckpointWriter:
    """Writes the safetensors files of a layout; a context manager.

    Leaving the block without an exception checks that every tensor was written exactly once and syncs the files.

    Args:
        index: The source.
        layout: What to write, from `plan_layout`.
        folder: Existing folder that receives the files.
        kept: Checksums of tensors that an earlier writer left in the same files (see `intact`); they are not
            written again.
        device: Where copies of rotated tensors are computed; None for the CPU.

    Attributes:
        checksums: SHA-256 of the stored bytes of every tensor written so far, by name.
        changed: Tensors that would have been copies, but were given new values.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        layout: Layout,
        folder: Path,
        kept: Mapping[str, str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.checksums: dict[str, str] = dict(kept or {})
        self._reader = TensorReader(index, device=device)
        self._layout = layout
        self._folder = folder
        self._streams: dict[str, BinaryIO] = {}
        self._reserved: Callable[[], None] = lambda: None  # waits until the files have their blocks
        self._entries = {entry.name: (file.name, entry) for file in layout.files for entry in file.entries}
        self.changed = {name for name in self.checksums if self._entries[name][1].source is not None}

    def __enter__(self) -> Self:
        with ExitStack() as unless_all_are_open:
            unless_all_are_open.callback(self._close_streams)
            with disk_errors(self._folder):
                for file in self._layout.files:
                    stream = (self._folder / file.name).open("r+b" if self.checksums else "wb", buffering=0)
                    self._streams[file.name] = stream
                    if not self.checksums:
                        stream.truncate(file.total_bytes)
                        _write_all(stream, 0, [file.header])
            unless_all_are_open.pop_all()
        if not self.checksums:
            self._reserved = beside(self._reserve_files)
        return self

    def _reserve_files(self) -> None:
        """Give the files their blocks, which takes seconds where they are memory."""
        with disk_errors(self._folder):
            for file in self._layout.files:
                _reserve(self._streams[file.name], file.total_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_streams()

    def write_layer(self, layer: RoundedLayer) -> None:
        """Pack a rounded layer and write its tensors.

        Raises:
            InputError: If the layer is not as the layout planned it.
            NumericalError: If it was written before, or the disk refuses.
        """
        for name, tensor in packed_tensors(layer).items():
            self.write(name, tensor)

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in the place of the source's of that name.

        Raises:
            InputError: If the source's is no such tensor.
            NumericalError: If it was written before, or the disk refuses.
        """
        self.write(name, tensor)
        self.changed.add(name)

    def copy_rest(self) -> None:
        """Stream every tensor of the source that is neither packed nor written yet, in pieces of at most 16 MiB.

        Raises:
            InputError: If the source cannot be read.
            NumericalError: If a tensor was written before, or the disk refuses.
        """
        for name in self.copies():
            self.copy(name)

    def copies(self) -> list[str]:
        """Tensors that are copied verbatim from the source and not yet written."""
        found = [name for name, (_, entry) in self._entries.items() if entry.source is not None]
        return [name for name in found if name not in self.checksums]

    def copy(self, name: str) -> None:
        """Copy one of them; errors are those of `copy_rest`."""
        entry = self._entries[name][1]
        assert entry.source is not None  # copies() names no other
        self._write_bytes(name, entry, self._reader.chunks(entry.source))

    def close(self) -> None:
        """Write the shard index if there are several files, sync everything and check completeness.

        Raises:
            NumericalError: If a planned tensor was not written, or the disk refuses.
        """
        try:
            self._reserved()
            missing = [name for name in self._entries if name not in self.checksums]
            if missing:
                raise NumericalError(
                    f"{len(missing)} planned tensors were not written, first {missing[0]}; expected all; run again"
                )
            # In the order of the layout, whichever was written first.
            self.checksums = {name: self.checksums[name] for name in self._entries}
            with disk_errors(self._folder):
                for stream in self._streams.values():
                    os.fsync(stream.fileno())
                index_json = self._layout.index_json()
                if index_json is not None:
                    _write_json(self._folder / INDEX_FILE, index_json)
        finally:
            self._close_streams()

    def _close_streams(self) -> None:
        with suppress(NumericalError):  # told by who writes
            self._reserved()
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the layout; errors are those of `write_layer`."""
        if name not in self._entries:
            raise InputError(f"{name} is not in the planned layout; expected only planned layers; plan it again")
        entry = self._entries[name][1]
        found = dtype_name(tensor.dtype), tuple(tensor.shape)
        if found != (entry.dtype, entry.shape):
            raise InputError(f"{name} is {found[0]} {list(found[1])}; the layout has {entry.dtype} {list(entry.shape)}")
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        view = flat.numpy().data
        self._write_bytes(name, entry, (view[at : at + CHUNK_BYTES] for at in range(0, len(view), CHUNK_BYTES)))

    def _write_bytes(self, name: str, entry: Entry, pieces: Iterable[bytes | memoryview]) -> None:
        if name in self.checksums:
            raise NumericalError(f"tensor {name} was written twice; expected once; report this with the command used")
        digest = hashlib.sha256()
        stream = self._streams[self._entries[name][0]]
        self._reserved()
        with disk_errors(self._folder):
            written = _write_all(stream, entry.offset, _hashed(pieces, digest.update))
        if written != entry.num_bytes:
            raise NumericalError(f"tensor {name} has {written} bytes; the layout has {entry.num_bytes}; run again")
        self.checksums[name] = digest.hexdigest()


def unfinished_reader(layout: Layout, folder: Path) -> TensorReader | None:
    """Reads what an interrupted writer of a layout left in a folder; None where the files are not those it begins.

    Every tensor of the layout can be read; which of them were written is for the caller to know (see `intact`).
    """
    files = tuple(folder / file.name for file in layout.files)
    for path, file in zip(files, layout.files, strict=True):
        try:
            with path.open("rb") as stream:
                begun = stream.read(len(file.header)) == file.header and path.stat().st_size == file.total_bytes
        except OSError:
            begun = False
        if not begun:
            return None
    tensors = {info.name: info for path in files for info in read_header(path)}
    return TensorReader(CheckpointIndex(folder, files, tensors))


def intact(reader: TensorReader, checksums: Mapping[str, str]) -> bool:
    """Whether tensors have the stored bytes that belong to checksums by name."""
    return all(
        name in reader and hashlib.sha256(reader.raw(name)).hexdigest() == expected
        for name, expected in checksums.items()
    )


def copy_small_files(source: Path, target: Path) -> tuple[str, ...]:
    """Copy the tokenizer and the other files that belong to a checkpoint (see `companion_files`).

    Links are followed, because a hub cache holds links only.

    Returns:
        Paths of the files copied, relative to the folder, sorted.

    Raises:
        InputError: As `companion_files`.
        NumericalError: If a file cannot be copied.
    """
    names = companion_files(source)
    with disk_errors(target):
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    return names


def write_config(source: Path, target: Path, quantization_config: dict[str, Any], untied: bool = False) -> None:
    """Write ``config.json`` into the folder ``target``: the source folder's, with the ``quantization_config``.

    Args:
        source: The original.
        target: Folder to write into.
        quantization_config: How the weights are packed.
        untied: Whether the head has a weight of its own, whatever the source says.

    Raises:
        InputError: If the source's cannot be read.
        NumericalError: If the disk refuses.
    """
    path = source / "config.json"
    try:
        config = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is not readable JSON ({error}); expected a model configuration; restore it") from None
    config = without_quantization(config) | ({UNTIED: False} if untied else {})
    config |= {"quantization_config": quantization_config}
    with disk_errors(target):
        _write_json(target / "config.json", config)


def _reserve(stream: BinaryIO, size: int) -> None:
    """Give a file its blocks where the system can, so that a full disk shows early."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise


def _hashed(pieces: Iterable[bytes | memoryview], update: Any) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        update(piece)
        yield piece


def _write_all(stream: BinaryIO, offset: int, pieces: Iterable[bytes | memoryview]) -> int:
    """Write pieces from an offset on; an unbuffered write may be short, so each is repeated until done."""
    stream.seek(offset)
    total = 0
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            count = stream.write(view)
            view = view[count:]
            total += count
    return total


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
