"""Tensors that are rotated as they are read: norm gains folded in, both sides turned, stored once in their dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo
from hawqtool.checkpoint.rotated.hadamard import Rotation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SLAB = 1 << 17
"""Weights that are rotated at a time: the float64 intermediates stay in a core's cache."""

_DEVICE_SLAB = 1 << 23
"""The same on a GPU, where each slab costs the host some thirty calls."""


@dataclass(frozen=True)
class RotatedInfo(TensorInfo):
    """A tensor ``R^T (W diag(offset + gain)) Q`` of a stored one, or a constant in its place.

    Args:
        base: What it is made of: ``[out, in]``, or ``[out]`` for a bias, whose one side is its last.
        gain: Gains of the norm before it, ``[in]``; None where there is no norm.
        offset: What the model adds to gains, 0 or 1.
        last: Q, by blocks of its size along the last dimension; None for the identity.
        first: R, by blocks along the first of two dimensions; None for the identity.
        constant: Value of all elements, for gains that went elsewhere.
    """

    base: TensorInfo
    gain: TensorInfo | None = None
    offset: float = 0.0
    last: Rotation | None = None
    first: Rotation | None = None
    constant: float | None = None


def rotated(base: TensorInfo, name: str | None = None) -> RotatedInfo:
    """A tensor that is as its base so far, under its name or another."""
    place = (base.dtype, base.shape, base.file, base.start, base.num_bytes)
    return RotatedInfo(name or base.name, *place, base=base)


def original_index(index: CheckpointIndex) -> CheckpointIndex:
    """The index with every rotated tensor as it was; one that was added for a tied matrix is that matrix again."""
    tensors = {
        name: replace(info.base, name=name) if isinstance(info, RotatedInfo) else info
        for name, info in index.tensors.items()
    }
    return replace(index, tensors=tensors, rotation=None)


def rotate_tensor(
    info: RotatedInfo,
    read: Callable[[TensorInfo], Tensor],
    dtype: str | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Compute a rotated tensor; all products are float64, rounded once at the end.

    Args:
        info: What to compute.
        read: Reads a stored tensor.
        dtype: Safetensors name of the result's dtype, where it is not the stored one.
        device: Where to compute (default: the CPU); the bits are the same everywhere.

    Returns:
        Tensor of the shape of ``info``, contiguous, on that device.
    """
    import torch

    from hawqtool.checkpoint.dtypes import torch_dtype

    kind, device = torch_dtype(dtype or info.dtype), device or torch.device("cpu")
    if info.constant is not None:
        return torch.full(info.shape, info.constant, dtype=kind, device=device)
    base = read(info.base).to(device, non_blocking=True)
    gain = None if info.gain is None else read(info.gain).to(device).double() + info.offset
    rows = base.reshape(1, -1) if base.ndim == 1 else base
    turned = _turned if device.type == "cpu" else _turned_on_device
    if info.first is None:
        return turned(rows, gain, info.last, kind).reshape(info.shape)
    if gain is not None or info.last is not None:
        rows = turned(rows, gain, info.last, torch.float64)
    return turned(rows.t(), None, info.first, kind).t().contiguous()


def _turned(rows: Tensor, gain: Tensor | None, rotation: Rotation | None, dtype: torch.dtype) -> Tensor:
    """``rows diag(gain) Q`` in ``dtype``, some rows at a time."""
    import torch

    result = torch.empty(rows.shape, dtype=dtype)
    step = max(1, _SLAB // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].double()
        if gain is not None:
            part = part * gain
        result[start : start + step] = part if rotation is None else rotation.apply(part)
    return result


def _turned_on_device(rows: Tensor, gain: Tensor | None, rotation: Rotation | None, dtype: torch.dtype) -> Tensor:
    """`_turned` in the order of memory that a GPU wants: channels first, so that those of many rows lie together."""
    import torch

    # Where rows are a transposed matrix, so is the result: both then lie as they are computed.
    transposed = rows.stride(0) == 1
    shape = rows.shape[::-1] if transposed else rows.shape
    result = torch.empty(shape, dtype=dtype, device=rows.device)
    target = result.t() if transposed else result
    step = max(1, _DEVICE_SLAB // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].t().to(torch.float64, memory_format=torch.contiguous_format, copy=True)
        if gain is not None:
            part *= gain[:, None]
        if rotation is not None:
            signs = rotation.signs_on(part.device)
            part = rotation.mix_columns(part.mul_(signs.repeat(len(part) // len(signs))[:, None]))
        # As on a CPU, narrow numbers are rounded from float32: half of them has no other way there.
        target[start : start + step] = part.t() if dtype == torch.float64 else part.float().t()
    return target
