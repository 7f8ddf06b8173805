"""Scales of float grids, searched among those that can be stored, against the error that matters.

NVFP4: every E4M3 scale from 0.75 to 1.9 times that which takes the largest weight to 6 (ScaleSweep, arXiv 2606.07618,
bounds the useful ones). MX: three powers of two around that. FP8: parts of one binade, as only the mantissa matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.formats.grids import WeightGrid
from hawqtool.rounding.floats.elements import E4M3, ELEMENTS, Element

_MODEL_PARTS = tuple(2 ** (-step / 16) for step in range(16))
"""Parts of the largest scale that are tried where scales have the model's dtype."""

_CODE_STEPS = tuple(range(-3, 8))
"""E4M3 codes below and above that of the scale which takes the largest weight to the largest code."""

_POWERS = (-1, 0, 1)
"""Exponents around that of the largest weight over the largest code, rounded down."""

_HEADROOM = 2.0
"""How much larger than the weights targets may become: compensation moves errors, scales are searched beyond 1. Inputs
of text that calibration did not see may exceed those that it saw as well."""

_LEAST_PEAK, _MOST_POWER = 1e-30, 120

_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def common_divisor(weights: list[Tensor]) -> float:
    """Divisor of the E4M3 scales of weights that engines fuse, a power of two.

    The largest scale must be storable. A power of two makes every weight exact in bfloat16: code times scale has six
    bits, so that loaders agree whatever the order in which they multiply. What it costs is at most a bit of range.

    Args:
        weights: The weights of the fused set, ``[out, in]`` each.
    """
    return divisor_of_peak(max([0.0, *(float(weight.abs().max()) for weight in weights if weight.numel())]))


def divisor_of_peak(peak: float) -> float:
    """Divisor of the E4M3 scales of groups of E2M1 codes whose largest magnitude is ``peak``, a power of two.

    Scales of twice that and more are storable: targets grow while they are rounded, inputs of other rows are larger.
    """
    peak = max(_LEAST_PEAK, peak)
    power = math.floor(math.log2(E4M3.largest * ELEMENTS["e2m1"].largest / (_HEADROOM * peak)))
    return 2.0 ** max(-_MOST_POWER, min(_MOST_POWER, power))


def search_float_scales(
    weight: Tensor,
    column_weights: Tensor,
    quant_format: QuantFormat,
    stored_dtype: torch.dtype,
    divisor: float | None = None,
) -> Tensor:
    """Scale of each row and group that minimises sum_j c_j (w_j - s q_j)², q_j the nearest code.

    Args:
        weight: ``[out, in]`` float32.
        column_weights: ``[in]`` float32, what a squared error costs in each column.
        quant_format: A grid of floats.
        stored_dtype: dtype of the model's weights.
        divisor: That of E4M3 scales (see `common_divisor`).

    Returns:
        ``[out, groups]`` in ``stored_dtype``, positive; rows that share a scale have equal ones.
    """
    grid = quant_format.floats
    assert grid is not None  # the caller saw it
    width = quant_format.group_width(weight.shape[1])
    importance = column_weights.view(-1, width)
    found = []
    for rows in _chunks(weight, grid):
        groups = rows.unflatten(1, (-1, width))
        found.append(_search_rows(groups, importance, grid, stored_dtype, divisor))
    return torch.cat(found)


def storable(scales: Tensor, grid: WeightGrid, divisor: float | None) -> Tensor:
    """The nearest scales that a grid can store, float32; those of the model's dtype as they are.

    Args:
        scales: Positive, float32.
        grid: The grid.
        divisor: That of E4M3 scales.
    """
    if grid.scale == "e4m3":
        assert divisor is not None  # scales of this kind have one
        least = 2.0 ** (E4M3.least_exponent - E4M3.mantissa_bits)
        return E4M3.nearest_((scales * divisor).clamp_min_(least)) / divisor
    return torch.exp2(torch.log2(scales).round_()) if grid.scale == "e8m0" else scales


def _chunks(weight: Tensor, grid: WeightGrid) -> Iterator[Tensor]:
    """Some rows at a time, those that share a scale together."""
    rows = _CHUNK_ELEMENTS[weight.device.type] // max(weight.shape[1], 1)
    yield from weight.split(max(1, rows // grid.group_rows) * grid.group_rows)


def _search_rows(
    groups: Tensor, importance: Tensor, grid: WeightGrid, stored_dtype: torch.dtype, divisor: float | None
) -> Tensor:
    """Scales ``[rows, groups]`` of rows ``[rows, groups, width]``."""
    element = ELEMENTS[grid.element]
    peak = _shared(groups.abs().amax(-1), grid, torch.amax)
    # A group of zeros keeps a positive scale, so that nothing divides by zero.
    start = torch.where(peak > 0, peak, torch.ones_like(peak)) / element.largest
    best = torch.full_like(start, float("inf"))
    scales = torch.ones_like(start).to(stored_dtype)
    for candidate in _candidates(start, grid, divisor):
        scale = candidate.to(stored_dtype)
        usable = torch.isfinite(scale) & (scale > 0)
        error = _errors(groups, torch.where(usable, scale, 1.0).float(), importance, element)
        error = torch.where(usable, _shared(error, grid, torch.sum), torch.inf)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    return scales


def _errors(groups: Tensor, scale: Tensor, importance: Tensor, element: Element) -> Tensor:
    """Weighted squared error of each row and group, ``[rows, groups]``."""
    scaled = groups / scale[..., None]
    difference = element.nearest_(scaled.clone()).sub_(scaled).square_()
    return (difference * importance).sum(-1) * scale.square()


def _shared(values: Tensor, grid: WeightGrid, reduce: object) -> Tensor:
    """Values ``[rows, groups]`` reduced over the rows that share a scale, and repeated for each of them."""
    if grid.group_rows == 1:
        return values
    assert callable(reduce)
    blocks: Tensor = reduce(values.unflatten(0, (-1, grid.group_rows)), 1)
    return blocks.repeat_interleave(grid.group_rows, dim=0)


def _candidates(start: Tensor, grid: WeightGrid, divisor: float | None) -> Iterator[Tensor]:
    """Scales to try, float32: ``start`` takes the largest weight to the largest code."""
    if grid.scale == "model":
        yield from (start * part for part in _MODEL_PARTS)
    elif grid.scale == "e8m0":
        exponents = torch.floor(torch.log2(start))
        yield from (torch.exp2((exponents + step).clamp_(-126, 127)) for step in _POWERS)
    else:
        first = storable(start, grid, divisor)
        assert divisor is not None
        codes = (first * divisor).to(torch.float8_e4m3fn).view(torch.uint8).int()
        for step in _CODE_STEPS:
            # The codes of positive E4M3 numbers rise by one with their values; 127 is NaN, 0 is zero.
            code = (codes + step).clamp_(1, 126).to(torch.uint8)
            yield code.view(torch.float8_e4m3fn).float() / divisor
