"""Experts that a checkpoint stores in one tensor per layer, seen as one matrix per expert and role."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo
from hawqtool.checkpoint.originals.codec import DequantizedInfo, leading, rows_of

_STACKED = re.compile(r"^(?P<experts>.*\bexperts)\.(?P<leaf>gate_up_proj|up_proj|down_proj)$")
_ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


def split_stacked(index: CheckpointIndex, wanted: Callable[[str], bool]) -> CheckpointIndex:
    """The index with tensors ``[experts, out, in]`` replaced by matrices ``[out, in]``; nothing is read or copied.

    ``M.experts.gate_up_proj`` becomes ``M.experts.0.gate_proj.weight``, ``M.experts.0.up_proj.weight`` and so on: each
    is a part of the same bytes. Tensors that lie otherwise, such as transposed ones or those with biases, stay.

    Args:
        index: The checkpoint.
        wanted: Whether to split the experts of that name, ``M.experts``.
    """
    tensors: dict[str, TensorInfo] = {}
    for info in index.tensors.values():
        match = _STACKED.match(info.name)
        if match and wanted(match["experts"]) and _rows_first(index, match["experts"]):
            tensors |= {part.name: part for part in _parts(info, match["experts"], _ROLES[match["leaf"]])}
        else:
            tensors[info.name] = info
    return replace(index, tensors=tensors)


def _rows_first(index: CheckpointIndex, experts: str) -> bool:
    """Whether matrices are ``[out, in]``, which the shapes of both tensors tell: inner and outer width are swapped."""
    first = index.tensors.get(f"{experts}.gate_up_proj") or index.tensors.get(f"{experts}.up_proj")
    down = index.tensors.get(f"{experts}.down_proj")
    if first is None or down is None or any(f"{experts}.{leaf}_bias" in index.tensors for leaf in _ROLES):
        return False
    shares = 2 if first.name.endswith("gate_up_proj") else 1
    if len(first.shape) != 3 or len(down.shape) != 3:
        return False
    if any(isinstance(info, DequantizedInfo) and info.transposed for info in (first, down)):
        return False
    count, outputs, width = first.shape
    return (
        down.shape == (count, width, outputs // shares) and outputs % shares == 0 and (shares == 2 or outputs != width)
    )


def _parts(info: TensorInfo, experts: str, roles: tuple[str, ...]) -> Iterator[TensorInfo]:
    count, outputs = info.shape[:2]
    rows = outputs // len(roles)
    for number in range(count):
        for place, role in enumerate(roles):
            part = rows_of(leading(info, number), place * rows, rows)
            yield replace(part, name=f"{experts}.{number}.{role}.weight")
