"""Lazy reading of single tensors from a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo
from hawqtool.checkpoint.originals.codec import DequantizedInfo, PartInfo, dequantize_tensor, read_part
from hawqtool.checkpoint.rotated.codec import RotatedInfo, rotate_tensor
from hawqtool.errors import InputError, InputLostError, NumericalError

CHUNK_BYTES = 16 << 20


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse weights that are NaN or Inf where they are loaded, so that the message can name the tensor.

    Args:
        name: Name for the message.
        tensor: Values of any floating dtype, on any device.

    Raises:
        NumericalError: If a value is NaN or Inf.
    """
    # The extremes show every NaN and Inf and, unlike isfinite, need no second tensor of this size.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise NumericalError(
            f"tensor {name} has NaN or Inf in {count} of its {tensor.numel()} values; expected finite weights; "
            "download the checkpoint again"
        )


def check_all_finite(tensors: Mapping[str, Tensor]) -> None:
    """`check_finite` for tensors by name, all on one device; a GPU is waited for once, not for each.

    Raises:
        NumericalError: If a value is NaN or Inf; names the first tensor that has one.
    """
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not filled:
        return
    extremes = torch.stack([torch.stack(torch.aminmax(tensor)).double() for tensor in filled.values()])
    for name, finite in zip(filled, extremes.isfinite().all(1).tolist(), strict=True):
        if not finite:
            check_finite(name, filled[name])


class TensorReader:
    """Reads tensors one at a time; files are opened per read and never memory-mapped.

    A mapped page can stay resident and counts against a memory limit, so plain reads keep the peak at one tensor.
    Where the index has a record of its content, each read is compared with it.

    Args:
        index: The checkpoint.
        exact: Whether rotated tensors are given in float64, as they are before they are rounded to their dtype.
        device: Where rotated tensors are computed and given; None for the CPU, where all others are.
    """

    def __init__(self, index: CheckpointIndex, exact: bool = False, device: torch.device | None = None) -> None:
        self.index, self._exact, self._device = index, exact, device

    def __contains__(self, name: object) -> bool:
        return name in self.index.tensors

    def info(self, name: str) -> TensorInfo:
        """Header entry of a tensor.

        Raises:
            InputError: If the checkpoint has no such tensor.
        """
        if name not in self.index.tensors:
            raise InputError(f"tensor {name} is not in {self.index.folder}; expected it from the model's structure")
        return self.index.tensors[name]

    def tensor(self, name: str, pinned: bool = False) -> Tensor:
        """Tensor in the source dtype, in its own memory, which on the CPU is page-locked where ``pinned``.

        Raises:
            InputError: If there is no such tensor or the file cannot be read.
        """
        return self.read(self.info(name), pinned)

    def read(self, info: TensorInfo, pinned: bool = False) -> Tensor:
        """Tensor of a header entry, or of a part of one; computed where it stands for codes and scales, or is rotated.

        Raises:
            InputError: If the file cannot be read.
        """
        if isinstance(info, DequantizedInfo | PartInfo | RotatedInfo):
            weight = self._computed(info, pinned)
            return weight.pin_memory() if pinned and weight.device.type == "cpu" else weight
        dtype = torch_dtype(info.dtype)
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        buffer = torch.empty(info.num_bytes, dtype=torch.uint8, pin_memory=pinned)
        try:
            with info.file.open("rb", buffering=0) as stream:
                stream.seek(info.start)
                view, done = buffer.numpy().data, 0
                while done < info.num_bytes:
                    count = stream.readinto(view[done : done + (1 << 30)])
                    if not count:
                        raise InputLostError(f"{info.file} ended inside tensor {info.name}; download or save it again")
                    done += count
        except OSError as error:
            raise InputLostError(
                f"tensor {info.name} of {info.file} cannot be read ({error.strerror}); check the disk"
            ) from None
        if self.index.content is not None:
            self.index.content.check(info.place, hashlib.sha256(view).digest(), info.name)
        return buffer.view(dtype).reshape(info.shape)

    def _computed(self, info: DequantizedInfo | PartInfo | RotatedInfo, pinned: bool = False) -> Tensor:
        if isinstance(info, RotatedInfo):
            on_device = self._device is not None and self._device.type != "cpu"
            read = partial(self.read, pinned=pinned and on_device)
            return rotate_tensor(info, read, "F64" if self._exact else None, self._device)
        return read_part(info, self.read) if isinstance(info, PartInfo) else dequantize_tensor(info, self.read)

    def raw(self, name: str) -> bytes:
        """Bytes of a tensor as `tensor` returns it.

        Raises:
            InputError: As `tensor`.
        """
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """Bytes of a tensor in pieces of at most 16 MiB.

        Raises:
            InputError: As `tensor`.
        """
        info = self.info(name)
        if isinstance(info, DequantizedInfo | PartInfo | RotatedInfo):
            view = self.read(info).cpu().view(-1).view(torch.uint8).numpy().data
            yield from (bytes(view[at : at + CHUNK_BYTES]) for at in range(0, len(view), CHUNK_BYTES))
            return
        digest = None if self.index.content is None else hashlib.sha256()
        try:
            with info.file.open("rb", buffering=0) as stream:
                stream.seek(info.start)
                left = info.num_bytes
                while left:
                    piece = stream.read(min(left, CHUNK_BYTES))
                    if not piece:
                        raise InputLostError(f"{info.file} ended inside tensor {name}; download or save it again")
                    left -= len(piece)
                    if digest is not None:
                        digest.update(piece)
                    yield piece
        except OSError as error:
            raise InputLostError(
                f"tensor {name} of {info.file} cannot be read ({error.strerror}); check the disk"
            ) from None
        if self.index.content is not None and digest is not None:
            self.index.content.check(info.place, digest.digest(), name)
