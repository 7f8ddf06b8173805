"""Codes on fixed block grids: nearest ones, and the column loop with later columns making up for errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockGrid
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.rounding.factor import Factor
from hawqtool.rounding.gptq import BLOCK_SIZE, RowGrids, round_compensated
from hawqtool.rounding.grid import expand_scales

_NO_STEP = 1e30
"""Stands for a step of zero: every weight is less than half of it, so that its code is zero."""


def nearest_block_codes(weight: Tensor, grid: BlockGrid, kind: BlockType) -> Tensor:
    """Code of the nearest value of the grid, ``[out, in]`` int8; half to even, in tables to the lower value.

    Args:
        weight: ``[out, in]`` float32.
        grid: Steps and offsets.
        kind: Type of the blocks.
    """
    columns = weight.shape[1]
    target = weight if grid.offsets is None else weight - expand_scales(grid.offsets, columns)
    in_steps = target / expand_scales(_usable(grid.steps), columns)
    if kind.values is None:
        return in_steps.round_().clamp_(kind.min_code, kind.max_code).to(torch.int8)
    return torch.bucketize(in_steps, _middles(in_steps.new_tensor(kind.values))).to(torch.int8)


def round_block_codes(target: Tensor, grid: BlockGrid, factor: Factor, kind: BlockType) -> Tensor:
    """Codes by the column loop of GPTQ on a grid that stays as it is, ``[out, in]`` int8.

    A value of the grid is ``step * code + offset``, so the loop rounds the target less the offset on a grid without
    one: the error of a column, hence all feedback, is the same. Scales lie at fixed places, so that any order of
    visiting is possible.

    Args:
        target: ``[out, in]`` float32, what is rounded.
        grid: Steps and offsets.
        factor: Factor of the Gram matrix of the inputs.
        kind: Type of the blocks.
    """
    if kind.values is not None:
        return _round_on_table(target, grid.steps, factor, kind.values)
    rows = len(target)
    shifted = target if grid.offsets is None else target - expand_scales(grid.offsets, target.shape[1])
    lowest, highest = (target.new_full((rows,), bound) for bound in (kind.min_code, kind.max_code))
    return round_compensated(shifted, RowGrids(_usable(grid.steps), lowest, highest), factor)


def _round_on_table(target: Tensor, steps: Tensor, factor: Factor, values: Sequence[int]) -> Tensor:
    """`round_block_codes` where codes stand for values of a table, by torch's own operations."""
    table = target.new_tensor(values)
    middles = _middles(table)
    columns = target.t().index_select(0, factor.order)
    visited = expand_scales(_usable(steps), target.shape[1]).t().index_select(0, factor.order)
    codes, pivots = torch.empty_like(columns, dtype=torch.int8), factor.upper.diagonal().tolist()
    for first in range(0, len(columns), BLOCK_SIZE):
        end = min(first + BLOCK_SIZE, len(columns))
        errors = torch.empty_like(columns[first:end])
        for j in range(first, end):
            code = torch.bucketize(columns[j] / visited[j], middles)
            codes[j] = code.to(torch.int8)
            errors[j - first] = (columns[j] - table[code] * visited[j]) / pivots[j]
            columns[j + 1 : end].addr_(factor.upper[j, j + 1 : end], errors[j - first], alpha=-1.0)
        columns[end:].addmm_(factor.upper[first:end, end:].t(), errors, alpha=-1.0)
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return result.t().contiguous()


def _middles(table: Tensor) -> Tensor:
    """Where the nearest value changes."""
    return (table[1:] + table[:-1]) / 2


def _usable(steps: Tensor) -> Tensor:
    return torch.where(steps == 0, _NO_STEP, steps)
