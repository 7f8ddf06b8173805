"""Experts that a checkpoint stores in one tensor per layer, seen as one matrix per expert and role."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.index import CheckpointIndex, ExpertStack, TensorInfo
from hawqtool.checkpoint.originals.codec import DequantizedInfo, PartInfo, leading, rows_of
from hawqtool.errors import InputError


def split_stacked(index: CheckpointIndex, stacks: Mapping[str, ExpertStack]) -> CheckpointIndex:
    """The index with the tensors of all experts of a layer replaced by one per expert and linear; nothing is read.

    ``M.experts.gate_up_proj`` becomes ``M.experts.0.gate_proj.weight``, ``M.experts.0.up_proj.weight`` and so on: each
    is a part of the same bytes.

    Args:
        index: The checkpoint.
        stacks: How such tensors are stored, by their names.

    Raises:
        InputError: If a tensor has no such shape.
    """
    tensors: dict[str, TensorInfo] = {}
    for info in index.tensors.values():
        stack = stacks.get(info.name)
        if stack is None:
            tensors[info.name] = info
        else:
            tensors |= {part.name: part for part in _parts(info, stack)}
    return replace(index, tensors=tensors, stacks=dict(stacks))


def _parts(info: TensorInfo, stack: ExpertStack) -> Iterator[TensorInfo]:
    dimensions, shares = 3 if stack.leaf == "weight" else 2, len(stack.linears)
    if len(info.shape) != dimensions or info.shape[-1 if stack.transposed else 1] % shares:
        raise InputError(
            f"{info.name} has shape {list(info.shape)}; expected {dimensions} dimensions, the rows of {shares} linears "
            "per expert; download the checkpoint again"
        )
    for number in range(info.shape[0]):
        for place, linear in enumerate(stack.linears):
            part = _part(leading(info, number), stack, place)
            yield replace(part, name=f"{stack.experts}.{number}.{linear}.{stack.leaf}")


def _part(whole: TensorInfo, stack: ExpertStack, place: int) -> TensorInfo:
    """The rows of one linear in the tensor of an expert."""
    shares = len(stack.linears)
    rows = whole.shape[-1 if stack.transposed else 0] // shares
    together = stack.concatenated or shares == 1
    first = place * rows if together else place
    if together and not stack.transposed and not (isinstance(whole, DequantizedInfo) and whole.transposed):
        return rows_of(whole, first, rows)
    shape = (rows, *(whole.shape[:-1] if stack.transposed else whole.shape[1:]))
    size = math.prod(shape) * DTYPE_BYTES[whole.dtype]
    step = 1 if together else shares
    return PartInfo(whole.name, whole.dtype, shape, whole.file, whole.start, size, whole, first, step, stack.transposed)
