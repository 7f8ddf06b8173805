"""Codes on fixed block grids: nearest ones, and the column loop with later columns making up for errors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockGrid
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.rounding.factor import Factor
from hawqtool.rounding.gptq import BLOCK_SIZE, RowGrids, round_compensated
from hawqtool.rounding.grid import expand_scales
from hawqtool.rounding.kernels.dispatch import table_loop

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
    return _table_codes(in_steps, 2 * kind.values[0], _half_steps(kind.values, weight.device))


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
    """`round_block_codes` where codes stand for values of a table."""
    table, compiled = target.new_tensor(values), table_loop(target.device)
    columns = target.t().index_select(0, factor.order)
    visited = expand_scales(_usable(steps), target.shape[1]).t().index_select(0, factor.order)
    codes, size = torch.empty_like(columns, dtype=torch.int8), compiled.BLOCK_COLUMNS if compiled else BLOCK_SIZE
    round_block = compiled.round_block if compiled else _round_table_block
    for first in range(0, len(columns), size):
        part = slice(first, min(first + size, len(columns)))
        errors = torch.empty_like(columns[part])
        round_block(columns[part], visited[part], factor.upper[part, part], table, codes[part], errors)
        columns[part.stop :].addmm_(factor.upper[part, part.stop :].t(), errors, alpha=-1.0)
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return result.t().contiguous()


def _round_table_block(
    columns: Tensor, steps: Tensor, upper: Tensor, table: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """One block of columns by torch's own operations (the arguments are those of the compiled one)."""
    values = tuple(map(int, table.tolist()))
    places, pivots = _half_steps(values, columns.device), upper.diagonal().tolist()
    for j in range(len(columns)):
        codes[j] = code = _table_codes(columns[j] / steps[j], 2 * values[0], places)
        errors[j] = (columns[j] - table.index_select(0, code.int()) * steps[j]) / pivots[j]
        columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1.0)


@lru_cache(maxsize=16)
def _half_steps(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Code of the nearest value of a table for every half step between its ends, int8; of two the lower one.

    Values are whole numbers, so that nearest values change at half steps alone. A look-up takes a twentieth of the
    time of a search for the middles on a CPU.
    """
    table = torch.tensor(values, dtype=torch.float32)
    halves = torch.arange(2 * values[0], 2 * values[-1] + 1) / 2
    return torch.bucketize(halves, (table[1:] + table[:-1]) / 2).to(torch.int8).to(device)


def _table_codes(in_steps: Tensor, lowest: int, places: Tensor) -> Tensor:
    """Codes of the nearest values, int8 of the shape of ``in_steps``; NaN gets the code of zero.

    Args:
        in_steps: Weights in units of their scale.
        lowest: Half steps to the smallest value.
        places: Code by half step from there on.
    """
    halves = (in_steps * 2).ceil_().nan_to_num_().sub_(lowest).clamp_(0, len(places) - 1).to(torch.int32)
    return places.index_select(0, halves.flatten()).view_as(in_steps)


def _usable(steps: Tensor) -> Tensor:
    return torch.where(steps == 0, _NO_STEP, steps)
