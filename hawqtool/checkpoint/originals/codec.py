"""Weights that stand for others: codes and scales in the files, a 16-bit matrix to whoever reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.index import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SLAB = 1 << 22
"""Weights that are dequantized at a time: float32 intermediates stay small beside the matrix."""

Codes = Literal["float8", "e2m1", "int8", "packed"]


@dataclass(frozen=True)
class DequantizedInfo(TensorInfo):
    """A tensor that is computed from stored ones: ``w = (code - zero) * scale * factor``, or ``/ factor``.

    `dtype`, `shape` and `num_bytes` are those of the result; `file` and `start` those of the codes.

    Args:
        kind: How codes are stored: float8, pairs of E2M1 nibbles (low first), int8, or a dense bit stream in int32.
        label: Name of the format for people.
        codes: Codes; E2M1 ones may have a further dimension, which is joined with the one before.
        scale: Scales: floats, or exponents as E8M0 bytes, ``2^(byte - 127)``.
        block: Rows and columns that share a scale; the last block may be short.
        factor: Second scale of the whole tensor, if any.
        divides: Whether the factor is divided by (compressed-tensors) or multiplied with (modelopt).
        zeros: Zero points, packed along the rows or int8.
        columns: Index of the scale of each column, where columns were quantized in another order.
        bits: Bits of a packed code.
        transposed: Whether the result's last two dimensions are those of the codes swapped.
        first_row: Row of the scales' matrix that the first row of codes is, where only some rows are meant.
    """

    kind: Codes
    label: str
    codes: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    factor: TensorInfo | None = None
    divides: bool = False
    zeros: TensorInfo | None = None
    columns: TensorInfo | None = None
    bits: int = 8
    transposed: bool = False
    first_row: int = 0


@dataclass(frozen=True)
class PartInfo(TensorInfo):
    """Rows of a stored matrix, or entries of a vector, that do not lie together in the file.

    Args:
        whole: The matrix or vector.
        first: Number of the first row.
        step: From one row to the next.
        transposed: Whether the rows are columns of the stored matrix.
    """

    whole: TensorInfo
    first: int
    step: int
    transposed: bool


def leading(info: TensorInfo, position: int) -> TensorInfo:
    """Entry ``position`` of a tensor's first dimension, such as one expert, as a tensor of its own.

    A second scale or a scale with one entry for all is shared.
    """
    if isinstance(info, DequantizedInfo):
        shape = info.shape[1:]
        return replace(
            info,
            shape=shape,
            num_bytes=math.prod(shape) * DTYPE_BYTES[info.dtype],
            codes=leading(info.codes, position),
            scale=_of_entry(info.scale, info, position),
            factor=None if info.factor is None else _of_entry(info.factor, info, position),
        )
    size = info.num_bytes // info.shape[0]
    return replace(info, shape=info.shape[1:], start=info.start + position * size, num_bytes=size)


def rows_of(info: TensorInfo, start: int, count: int) -> TensorInfo:
    """Rows of a matrix, such as one of two that are stored as one; no transposed codes."""
    shape, size = (count, *info.shape[1:]), info.num_bytes // info.shape[0]
    if not isinstance(info, DequantizedInfo):
        return replace(info, shape=shape, start=info.start + start * size, num_bytes=count * size)
    assert not info.transposed  # rows of the result would be columns of the codes
    codes = rows_of(info.codes, start, count)
    return replace(info, shape=shape, num_bytes=count * size, codes=codes, first_row=info.first_row + start)


def _of_entry(part: TensorInfo, info: DequantizedInfo, position: int) -> TensorInfo:
    """The part of a scale that belongs to one entry; a scale of one element is shared."""
    return leading(part, position) if part.shape[:1] == info.shape[:1] else part


def read_part(info: PartInfo, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """Read a part, contiguous and in memory of its own.

    Args:
        info: What to read.
        read: Reads a stored tensor.
    """
    import torch

    whole = read(info.whole)
    rows = whole.t() if info.transposed else whole
    part = rows[info.first : info.first + info.step * info.shape[0] : info.step]
    return part.clone(memory_format=torch.contiguous_format)


def is_dequantized(info: TensorInfo) -> bool:
    """Whether a tensor is computed from codes and scales."""
    return isinstance(info.whole if isinstance(info, PartInfo) else info, DequantizedInfo)


def stored_parts(info: TensorInfo) -> Iterator[TensorInfo]:
    """What is read of the files for a tensor, each as it is read: itself, or codes and scales."""
    if isinstance(info, PartInfo):
        yield from stored_parts(info.whole)
    elif not isinstance(info, DequantizedInfo):
        yield info
    elif len(info.shape) > 2:
        for position in range(info.shape[0]):
            yield from stored_parts(leading(info, position))
    else:
        parts = (info.codes, info.scale, info.factor, info.zeros, info.columns)
        yield from (part for part in parts if part is not None)


def dequantize_tensor(info: DequantizedInfo, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """Compute a tensor from its parts, in float32, rounded once to its dtype.

    Args:
        info: What to compute.
        read: Reads a stored tensor.

    Returns:
        Tensor of the shape and dtype of ``info``, contiguous, on the CPU.
    """
    import torch

    from hawqtool.checkpoint.dtypes import torch_dtype

    result = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    if not info.num_bytes:
        return result
    if len(info.shape) > 2:
        for position in range(info.shape[0]):
            part = leading(info, position)
            assert isinstance(part, DequantizedInfo)
            result[position] = dequantize_tensor(part, read)
        return result
    target = result.t() if info.transposed else result
    rows, width = target.shape
    codes, scale = read(info.codes), _scales(info, read)
    columns = _column_groups(info, read, width)
    zeros = _zeros(info, read, rows, scale.shape[1])
    for slab in _slabs(rows, width):
        own = (torch.arange(slab.start, slab.stop) + info.first_row) // info.block[0]
        values = _values(info, codes[slab], width)
        if zeros is not None:
            values -= zeros[slab][:, columns]
        target[slab] = (values * scale[own][:, columns]).to(result.dtype)
    return result


def _slabs(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _SLAB // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _scales(info: DequantizedInfo, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """Float32 scales ``[1 or row blocks, 1 or column blocks]``, the second scale included."""
    import torch

    scale = read(info.scale)
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float()
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.dim() == 1:
        scale = scale.unsqueeze(1)
    if info.factor is not None:
        factor = read(info.factor).float().reshape(1, 1)
        scale = scale / factor if info.divides else scale * factor
    return scale


def _column_groups(info: DequantizedInfo, read: Callable[[TensorInfo], Tensor], width: int) -> Tensor:
    """Index of every column's scale."""
    import torch

    if info.columns is not None:
        return read(info.columns).long()
    shape = info.scale.shape
    count = shape[-1] if len(shape) > 1 else 1
    if count == 1:
        return torch.zeros(width, dtype=torch.long)
    return torch.arange(width) // info.block[1]


def _values(info: DequantizedInfo, codes: Tensor, width: int) -> Tensor:
    """Float32 values ``[rows, width]`` of a slab of codes."""
    import torch

    from hawqtool.checkpoint.packing import unpack_codes

    if info.kind == "packed":
        return unpack_codes(codes, info.bits, width).float()
    if info.kind != "e2m1":
        return codes.float()
    stored = codes.reshape(len(codes), -1).contiguous().view(torch.uint8).long()
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return table[torch.stack((stored & 15, stored >> 4), dim=-1)].reshape(len(codes), width)


def _zeros(info: DequantizedInfo, read: Callable[[TensorInfo], Tensor], rows: int, groups: int) -> Tensor | None:
    import torch

    from hawqtool.checkpoint.packing import unpack_zeros

    if info.zeros is None:
        return None
    zeros = read(info.zeros)
    if zeros.dtype == torch.int32:
        return unpack_zeros(zeros, info.bits, rows).float()
    return zeros.float().reshape(-1, groups).expand(rows, groups)
