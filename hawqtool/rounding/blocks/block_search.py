"""Stored scales of blocks, searched against the error that matters before anything is rounded.

Each sub-block gets the scale (and minimum) of least weighted squared error; of these a block's fp16 numbers and small
integers are made, which are refitted by weighted least squares to the weights. All errors are those of scales as they
are stored.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockFields, BlockGrid, block_grid, code_values, grid_values
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.formats import QuantFormat
from hawqtool.rounding.blocks.block_loop import nearest_block_codes
from hawqtool.rounding.grid import search_scales

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Weights that are searched at a time: a search holds some ten tensors of so many.

On a CPU they fit into its caches: a search of scales and offsets took a quarter of the time of 2^20 at a time.
"""

_SPANS = {
    3: tuple(1.05 - 0.05 * step for step in range(14)),
    15: tuple(1.1 - 0.02 * step for step in range(21)),
    31: tuple(1.06 - 0.01 * step for step in range(17)),
}
"""Parts of the range of a sub-block that codes up to this number are tried to cover.

Finer where codes are: weights that were rounded before, as those of models trained for 4 bits, lie on a grid that few
parts find.
"""

_ANCHORED = {
    steps: (*(steps + 0.05 * part for part in range(-18, 19)), *whole)
    for steps, whole in ((3, ()), (15, range(8, 15)), (31, range(18, 31)))
}
"""Steps from the lowest weight to the highest that are tried, by the largest code.

Close to the largest code those of ggml's search (make_qkx3_quants), so that none of its grids is missed; below that
whole numbers, which find the grid of weights that were rounded before.
"""

_TABLE_SPANS = tuple(1.15 - 0.05 * step for step in range(9))
"""Scales of tables for which the largest weight is this part of the largest value; with either sign."""

_LEAST_TARGET = 0.75
"""The largest scale of a block becomes an integer of at least this part of the largest there is."""

_ROUNDS = 3
"""Alternations of nearest codes and least squares; a third changed less than 0.1 % of the error."""


def search_blocks(weight: Tensor, costs: Tensor, kind: BlockType) -> BlockFields:
    """Stored scales of a weight, and its nearest codes on their grid.

    Args:
        weight: ``[out, in]`` float32, rows of whole blocks.
        costs: ``[in]`` float32, positive: what a squared error costs in each column.
        kind: Type of the blocks.
    """
    step = max(1, _CHUNK_ELEMENTS[weight.device.type] // weight.shape[1])
    found = [_search_rows(rows, costs, kind) for rows in weight.split(step)]
    parts = (None if part[0] is None else torch.cat(part) for part in zip(*found, strict=True))
    return BlockFields(*parts)  # type: ignore[arg-type]


def _search_rows(weight: Tensor, costs: Tensor, kind: BlockType) -> BlockFields:
    problem = _Problem(weight, costs, kind)
    if kind.has_minimum:
        scales, offsets = _search_affine(problem)
        fields = _store_affine(problem, scales, offsets)
    else:
        scales = _search_table(problem) if kind.values else _symmetric_scales(weight, costs, kind)
        fields = _store_symmetric(problem, scales)
    return _refitted(problem, fields)


class _Problem:
    """A few rows by sub-block.

    Args:
        weight: ``[rows, in]`` float32.
        costs: ``[in]`` float32.
        kind: Type of the blocks.
    """

    def __init__(self, weight: Tensor, costs: Tensor, kind: BlockType) -> None:
        self.kind = kind
        self.values = weight.view(len(weight), -1, kind.group_size)
        self.costs = costs.view(1, -1, kind.group_size)
        self.per_block = kind.block_size // kind.group_size

    @cached_property
    def cost_sums(self) -> Tensor:
        """Sum of the costs of each sub-block, ``[1, groups]``."""
        return self.costs.sum(-1)

    @cached_property
    def value_sums(self) -> Tensor:
        """Weighted sum of the weights of each sub-block, ``[rows, groups]``."""
        return self.sums(self.values)

    def sums(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Weighted sums over each sub-block, ``[rows, groups]``."""
        product = first if second is None else first * second
        return (product * self.costs).sum(-1)

    def by_block(self, values: Tensor) -> Tensor:
        """``[rows, groups]`` as ``[rows, blocks, sub-blocks]``."""
        return values.view(len(values), -1, self.per_block)

    def errors(self, fields: BlockFields) -> Tensor:
        """Weighted squared error of each block, ``[rows, blocks]``."""
        return self.by_block(self.group_errors(fields)).sum(-1)

    def group_errors(self, fields: BlockFields) -> Tensor:
        """Weighted squared error of each sub-block, ``[rows, groups]``."""
        restored = grid_values(fields.codes, block_grid(fields, self.kind), self.kind).view_as(self.values)
        return self.sums((restored - self.values).square_())

    def with_codes(self, fields: BlockFields) -> BlockFields:
        """The stored scales with the nearest codes of their grid."""
        weight = self.values.flatten(1)
        return fields._replace(codes=nearest_block_codes(weight, block_grid(fields, self.kind), self.kind))


def _symmetric_scales(weight: Tensor, costs: Tensor, kind: BlockType) -> Tensor:
    """Scale of either sign of every sub-block, ``[rows, groups]`` float32, as it is stored where it is fp16."""
    bits = (kind.max_code - kind.min_code + 1).bit_length() - 1
    stored = torch.float16 if kind.scale_codes is None else torch.float32
    grid = QuantFormat(bits, kind.group_size)
    return search_scales(weight, costs, grid, stored, both_signs=True).float()


def _search_table(problem: _Problem) -> Tensor:
    """Scale of either sign of every sub-block of a table of values, ``[rows, groups]`` float32."""
    values, kind = problem.values, problem.kind
    assert kind.values is not None  # the caller saw it
    low, high = values.aminmax(dim=-1)
    peak = torch.maximum(high, -low)
    energy, best = problem.sums(values, values), torch.zeros_like(peak)
    gained = torch.zeros_like(peak)
    for start in (peak * part / kind.values[0] for part in _TABLE_SPANS):
        for sign in (1, -1):
            levels = _table_levels(values, sign * start, kind)
            own, product = problem.sums(levels, levels), problem.sums(levels, values)
            # Least squares: with the scale product / own the error is energy - product^2 / own.
            gain = torch.where(own > 0, product.square() / own, 0.0)
            best = torch.where(gain > gained, product / own.clamp_min(1e-30), best)
            gained = torch.maximum(gain, gained)
    return torch.where(energy > 0, best, 0.0)


def _table_levels(values: Tensor, scale: Tensor, kind: BlockType) -> Tensor:
    codes = nearest_block_codes(values.flatten(1), BlockGrid(scale, None), kind)
    return code_values(codes, kind).view_as(values)


class _Affine(NamedTuple):
    """Scale and offset of every sub-block, ``[rows, groups]`` each, and their error."""

    scale: Tensor
    offset: Tensor
    error: Tensor


def _search_affine(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Scale, never negative, and offset of every sub-block, ``[rows, groups]`` float32.

    Codes are taken for parts of the range around its middle, and for numbers of steps from its lower end; least squares
    then gives scale and offset. The best are improved by taking codes anew. Offsets of K types are never positive, as
    their integers have no sign.
    """
    values, steps = problem.values, problem.kind.max_code
    low, high = values.aminmax(dim=-1)
    if problem.kind.max_minimum:
        low = low.clamp_max(0)
    span, middle = (high - low).clamp_min(1e-12), (high + low) / 2
    starts = [(span * part / steps, middle - span * part / 2) for part in _SPANS[steps]]
    starts += [(span / number, low) for number in _ANCHORED[steps]]
    best = _least_squares(problem, *starts[0])
    for scale, offset in starts[1:]:
        best = _better(best, _least_squares(problem, scale, offset))
    for _ in range(_ROUNDS):
        best = _better(best, _least_squares(problem, best.scale.clamp_min(1e-12), best.offset))
    return best.scale, best.offset


def _better(first: _Affine, second: _Affine) -> _Affine:
    lower = second.error < first.error
    return _Affine(*(torch.where(lower, b, a) for a, b in zip(first, second, strict=True)))


def _least_squares(problem: _Problem, scale: Tensor, offset: Tensor) -> _Affine:
    """Best scale and offset for the codes that a scale and an offset give."""
    values, kind = problem.values, problem.kind
    codes = ((values - offset.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().clamp_(0, kind.max_code)
    ones, x, xx = problem.cost_sums, problem.sums(codes), problem.sums(codes, codes)
    y, xy = problem.value_sums, problem.sums(codes, values)
    determinant = ones * xx - x * x
    solvable = determinant > 1e-7 * ones * xx
    safe = torch.where(solvable, determinant, 1.0)
    best_scale = torch.where(solvable, (ones * xy - x * y) / safe, scale)
    best_offset = torch.where(solvable, (xx * y - x * xy) / safe, (y - best_scale * x) / ones)
    if kind.max_minimum:
        above = best_offset > 0
        best_scale = torch.where(above & (xx > 0), xy / xx.clamp_min(1e-30), best_scale)
        best_offset = best_offset.clamp_max(0)
    best_scale = best_scale.clamp_min(0)
    if kind.scale_codes is None:
        best_scale, best_offset = best_scale.half().float(), best_offset.half().float()
    restored = codes.mul_(best_scale.unsqueeze(-1)).add_(best_offset.unsqueeze(-1))
    return _Affine(best_scale, best_offset, problem.sums(restored.sub_(values).square_()))


def _store_symmetric(problem: _Problem, scales: Tensor) -> BlockFields:
    """Stored fields of scales ``[rows, groups]``, with their nearest codes."""
    kind, rows = problem.kind, len(scales)
    empty = scales.new_empty((rows, 0), dtype=torch.int8)
    if kind.scale_codes is None:
        return problem.with_codes(BlockFields(empty, scales.half()))
    grid = BlockGrid(scales, None)
    codes = nearest_block_codes(problem.values.flatten(1), grid, kind)
    levels = grid_values(codes, BlockGrid(torch.ones_like(scales), None), kind).view_as(problem.values)
    lowest, highest = kind.scale_codes
    d, integers = _two_levels(problem, scales, problem.sums(levels, levels), lowest, highest)
    return problem.with_codes(BlockFields(empty, d, scales=integers))


def _store_affine(problem: _Problem, scales: Tensor, offsets: Tensor) -> BlockFields:
    """Stored fields of scales and offsets ``[rows, groups]``, with their nearest codes."""
    kind, values = problem.kind, problem.values
    empty = scales.new_empty((len(scales), 0), dtype=torch.int8)
    if kind.scale_codes is None:
        return problem.with_codes(BlockFields(empty, scales.half(), offsets.half()))
    codes = nearest_block_codes(values.flatten(1), BlockGrid(scales, offsets), kind).view_as(values).float()
    d, integers = _two_levels(problem, scales, problem.sums(codes, codes), 0, kind.scale_codes[1])
    steps = block_grid(BlockFields(empty, d, scales=integers), kind).steps
    # Offsets for the steps as they are stored.
    codes = nearest_block_codes(values.flatten(1), BlockGrid(steps, offsets), kind).view_as(values).float()
    weights = problem.costs.sum(-1).expand_as(scales)
    offsets = (problem.sums(values - codes * steps.unsqueeze(-1)) / weights).clamp_max(0)
    dmin, minima = _two_levels(problem, -offsets, weights, 0, kind.max_minimum)
    return problem.with_codes(BlockFields(empty, d, dmin, integers, minima))


def _two_levels(problem: _Problem, wanted: Tensor, weights: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """fp16 scale of each block and integers whose products come closest to what is wanted.

    Args:
        problem: The rows.
        wanted: ``[rows, groups]`` float32.
        weights: ``[rows, groups]``, what a squared error of each costs.
        lowest: Smallest integer.
        highest: Largest integer.

    Returns:
        ``[rows, blocks]`` float16 and ``[rows, groups]`` int8.
    """
    grouped, costs = problem.by_block(wanted), problem.by_block(weights)
    peak = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    targets = [*range(highest, int(_LEAST_TARGET * highest) - 1, -max(1, highest // 32))]
    targets += [-target - 1 for target in targets] if lowest < 0 else []
    best_error: Tensor | None = None
    for target in targets:
        d = (peak / target).half()
        step = d.float()
        integers = (grouped / torch.where(step == 0, 1.0, step)).round_().clamp_(lowest, highest)
        error = ((integers * step - grouped).square_() * costs).sum(-1, keepdim=True)
        if best_error is None:
            best_error, best_d, best_integers = error, d, integers
            continue
        lower = error < best_error
        best_error = torch.where(lower, error, best_error)
        best_d, best_integers = torch.where(lower, d, best_d), torch.where(lower, integers, best_integers)
    return best_d.squeeze(-1), best_integers.flatten(1).to(torch.int8)


def _refitted(problem: _Problem, fields: BlockFields) -> BlockFields:
    """The fields with fp16 numbers that fit codes and integers best, block by block, wherever that is better."""
    fields = _with_neighbours(problem, fields)
    error = problem.errors(fields)
    for _ in range(_ROUNDS):
        scale, minimum = _fitted(problem, fields)
        tried = problem.with_codes(fields._replace(scale=scale, minimum=minimum))
        found = problem.errors(tried)
        better = (found < error) & torch.isfinite(scale) & (scale.sign() == fields.scale.sign())
        wide = better.repeat_interleave(problem.kind.block_size, 1)
        fields = fields._replace(
            codes=torch.where(wide, tried.codes, fields.codes),
            scale=torch.where(better, scale, fields.scale),
            minimum=_chosen(better, minimum, fields.minimum),
        )
        error = torch.where(better, found, error)
    return _with_neighbours(problem, fields)


def _with_neighbours(problem: _Problem, fields: BlockFields) -> BlockFields:
    """The fields with integers of sub-blocks that are one more or less, wherever that is better with codes anew."""
    if fields.scales is None or problem.kind.scale_codes is None:
        return fields
    (lowest, highest), minima = problem.kind.scale_codes, fields.minima
    best, least = fields, problem.group_errors(fields)
    for move, other in ((a, b) for a in (-1, 0, 1) for b in ((0,) if minima is None else (-1, 0, 1)) if a or b):
        moved = fields._replace(
            scales=(fields.scales + move).clamp_(lowest, highest),
            minima=None if minima is None else (minima + other).clamp_(0, problem.kind.max_minimum),
        )
        tried = problem.with_codes(moved)
        error = problem.group_errors(tried)
        better = error < least
        wide = better.repeat_interleave(problem.kind.group_size, 1)
        best = best._replace(
            codes=torch.where(wide, tried.codes, best.codes),
            scales=_chosen(better, tried.scales, best.scales),
            minima=_chosen(better, tried.minima, best.minima),
        )
        least = torch.where(better, error, least)
    return best


def _chosen(better: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.where(better, first, second)


def _fitted(problem: _Problem, fields: BlockFields) -> tuple[Tensor, Tensor | None]:
    """Weighted least squares of the fp16 numbers of each block: w = d a + m b with known a and b."""
    kind = problem.kind
    ones = torch.ones_like(fields.scale)
    unit = fields._replace(scale=ones, minimum=None if fields.minimum is None else torch.zeros_like(ones))
    a = grid_values(fields.codes, block_grid(unit, kind), kind).view_as(problem.values)

    def total(values: Tensor) -> Tensor:
        return problem.by_block(values).sum(-1)

    aa, aw = total(problem.sums(a, a)), total(problem.sums(a, problem.values))
    if fields.minimum is None:
        return torch.where(aa > 0, aw / aa.clamp_min(1e-30), fields.scale.float()).half(), None
    factor = torch.ones_like(aa[:, :1]) if fields.minima is None else -fields.minima.float()
    b = factor.expand(len(aa), problem.values.shape[1])
    weights = problem.costs.sum(-1)
    bb, bw = total(b * b * weights), total(b * problem.sums(problem.values))
    ab = total(b * problem.sums(a))
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-7 * aa * bb
    safe = torch.where(solvable, determinant, 1.0)
    scale = torch.where(solvable, (bb * aw - ab * bw) / safe, fields.scale.float())
    minimum = torch.where(solvable, (aa * bw - ab * aw) / safe, fields.minimum.float())
    if fields.minima is not None:
        minimum = minimum.clamp_min(0)
    return scale.half(), minimum.half()
