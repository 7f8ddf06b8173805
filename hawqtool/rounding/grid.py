"""Scales and zero points, searched against the error that matters.

All candidates are cast to the stored dtype before their error is measured, so the file holds exactly
the scales that won (casting afterwards costs 1 to 2 % at 8 bits).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.rounding.floats.elements import CODE_DTYPE, ELEMENTS
from hawqtool.rounding.floats.scale_search import search_float_scales
from hawqtool.rounding.kernels.dispatch import scale_search

COARSE_STEPS = 20
FINE_STEPS = 4
LOWEST_RATIO = 0.3
ZERO_OFFSETS = (0, -1, 1)
"""Zero points tried around that of the range: within 1 % of trying all at 2 and 3 bits, and ±2 gave nothing more."""

_CHUNK_ELEMENTS = 1 << 21
"""Rows are searched in chunks of about this many weights: smaller ones lose more to calls than they gain in cache
(measured on two cores: 0.27 s at 2^17, 0.075 s at 2^21 for 3072 x 576), larger ones only take memory."""
_GPU_CHUNK_ELEMENTS = 1 << 26

_MOST_GROUPS = 65535
"""Groups of a chunk of several layers, as many as a GPU's grid has on its second axis."""


class Quantized(NamedTuple):
    """A rounded weight: ``dequantize(*quantized)`` is its value.

    Args:
        codes: ``[out, in]`` int8; on a grid of floats float8_e4m3fn, each code being its own value.
        scales: ``[out, groups]`` in the stored dtype, as they multiply codes.
        zeros: ``[out, groups]`` int8; None on a symmetric grid.
        divisor: What E4M3 scales are stored times of; None where scales are stored otherwise.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    divisor: float | None = None


def searches(symmetric: bool, both_signs: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Numbers of scales and of zero points that a search tries together, at first and around the best."""
    if symmetric:
        return (COARSE_STEPS, 2 if both_signs else 1), (2 * FINE_STEPS, 1)
    return (COARSE_STEPS, len(ZERO_OFFSETS)), (2 * FINE_STEPS, len(ZERO_OFFSETS))


def search_grid(
    weight: Tensor,
    column_weights: Tensor,
    quant_format: QuantFormat,
    stored_dtype: torch.dtype,
    both_signs: bool,
    divisor: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of a format, ``[out, groups]`` each; zero points are None on a symmetric grid.

    Arguments are those of `search_scales`, and the divisor of E4M3 scales; asymmetric grids have positive scales, since
    a zero point of ``-1 - zero`` gives every grid that a negative scale could. So have grids of floats, which are
    symmetric, and layers whose inputs are rounded.
    """
    if quant_format.floats is not None:
        return search_float_scales(weight, column_weights, quant_format, stored_dtype, divisor), None
    if quant_format.activations:
        both_signs = False  # kernels of such layers have not been seen with negative ones
    if quant_format.symmetric:
        return search_scales(weight, column_weights, quant_format, stored_dtype, both_signs), None
    return search_zeros(weight, column_weights, quant_format, stored_dtype)


def search_grids(
    weights: Sequence[Tensor],
    column_weights: Sequence[Tensor],
    quant_format: QuantFormat,
    stored_dtype: torch.dtype,
    both_signs: bool,
    divisors: Sequence[float | None],
) -> list[tuple[Tensor, Tensor | None]]:
    """`search_grid` for layers of one shape, to the bit; small ones, such as experts, go through it together.

    Groups do not depend on each other, so that those of many layers are laid out like those of one.

    Args:
        weights: ``[out, in]`` float32 each.
        column_weights: ``[in]`` float32 for each.
        quant_format: As for `search_scales`.
        stored_dtype: As for `search_scales`.
        both_signs: As for `search_scales`.
        divisors: Of E4M3 scales, for each.
    """
    together = _layers_together(weights[0], quant_format)
    if len(weights) == 1 or together == 1 or quant_format.floats is not None:
        asked = zip(weights, column_weights, divisors, strict=True)
        return [search_grid(w, costs, quant_format, stored_dtype, both_signs, d) for w, costs, d in asked]
    both_signs, found = both_signs and not quant_format.activations, list[tuple[Tensor, Tensor | None]]()
    for first in range(0, len(weights), together):
        stacked = torch.stack(list(weights[first : first + together]))
        width = quant_format.group_width(stacked.shape[2])
        laid = stacked.unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1).contiguous()
        costs = torch.stack(list(column_weights[first : first + together])).view(-1, width)
        groups = stacked.shape[2] // width
        if quant_format.symmetric:
            scales = _search_chunk(laid, costs, quant_format, stored_dtype, both_signs)
            found += [(part.contiguous(), None) for part in scales.split(groups, 1)]
        else:
            both = [v.split(groups, 1) for v in _search_zeros_chunk(laid, costs, quant_format, stored_dtype)]
            found += [(scales.contiguous(), zeros.contiguous()) for scales, zeros in zip(*both, strict=True)]
    return found


def _layers_together(weight: Tensor, quant_format: QuantFormat) -> int:
    """How many layers of this shape are one chunk; at least one, whose rows may make more than one."""
    groups = weight.shape[1] // quant_format.group_width(weight.shape[1])
    return max(1, min(_chunk_elements(weight) // max(weight.numel(), 1), _MOST_GROUPS // max(groups, 1)))


def search_scales(
    weight: Tensor,
    column_weights: Tensor,
    quant_format: QuantFormat,
    stored_dtype: torch.dtype,
    both_signs: bool,
) -> Tensor:
    """Scale of each (row, group) that minimises sum_j c_j (w_j - q_j)² over a coarse, then a fine list.

    Candidates run from 0.3 amax / (2^(b-1) - 1/2) to amax / (2^(b-1) - 1). The grid has one code more
    below zero than above, so with ``both_signs`` each candidate is tried with either sign.

    Args:
        weight: ``[out, in]`` float32.
        column_weights: ``[in]`` float32, what a squared error costs in each column (see `Factor.conditional`).
        quant_format: Width and group size.
        stored_dtype: dtype in which the scales are stored.
        both_signs: Allow negative scales.

    Returns:
        ``[out, groups]`` in ``stored_dtype``.
    """
    importance = column_weights.view(-1, quant_format.group_width(weight.shape[1]))
    chunks = _chunks(weight, quant_format)
    return torch.cat([_search_chunk(c, importance, quant_format, stored_dtype, both_signs) for c in chunks])


def search_zeros(
    weight: Tensor, column_weights: Tensor, quant_format: QuantFormat, stored_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each (row, group) that minimise sum_j c_j (w_j - s (q_j - z))².

    The start is the range from min(w, 0) to max(w, 0); candidates shrink it towards zero, down to 0.3 of it, over a
    coarse, then a fine list. That leaves the zero point where it is, so its neighbours are tried with every scale.

    Args:
        weight: ``[out, in]`` float32.
        column_weights: ``[in]`` float32, as for `search_scales`.
        quant_format: Width and group size.
        stored_dtype: dtype in which the scales are stored.

    Returns:
        ``[out, groups]`` in ``stored_dtype``, positive, and ``[out, groups]`` int8.
    """
    importance = column_weights.view(-1, quant_format.group_width(weight.shape[1]))
    found = [_search_zeros_chunk(c, importance, quant_format, stored_dtype) for c in _chunks(weight, quant_format)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _chunks(weight: Tensor, quant_format: QuantFormat) -> Iterator[Tensor]:
    """Some rows at a time, by group: ``[groups, rows, width]``."""
    columns = weight.shape[1]
    width = quant_format.group_width(columns)
    step = max(1, _chunk_elements(weight) // columns)
    for chunk in weight.split(step):
        yield chunk.reshape(-1, columns // width, width).transpose(0, 1).contiguous()


def _chunk_elements(like: Tensor) -> int:
    return _CHUNK_ELEMENTS if like.device.type == "cpu" else _GPU_CHUNK_ELEMENTS


def _search_chunk(
    weight: Tensor, importance: Tensor, quant_format: QuantFormat, stored_dtype: torch.dtype, both_signs: bool
) -> Tensor:
    """Scales ``[rows, groups]`` of a chunk laid out by group, ``[groups, rows, width]``."""
    lowest, highest = torch.aminmax(weight, dim=-1)
    peak = torch.maximum(highest, -lowest)
    # An all-zero group keeps a positive scale, so that its codes are zero and nothing divides by zero.
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    low = LOWEST_RATIO * peak / (quant_format.max_code + 0.5)
    high = peak / max(quant_format.max_code, 0.5)
    # A negative scale gives the grid that a zero point of -1 gives: the range of the codes from the other end.
    zeros = _constants((0.0, -1.0) if both_signs else (0.0,), peak.device).expand(-1, *peak.shape)
    search = _Search(weight, importance, quant_format, stored_dtype, low, high - low)
    best = search.attempt(search.start(zeros[0]), _coarse_places(peak), zeros)
    best = search.attempt(best, _fine_places(best.place), best.zero[None])
    return (best.scale * (1 + 2 * best.zero).to(stored_dtype)).t()


def _search_zeros_chunk(
    weight: Tensor, importance: Tensor, quant_format: QuantFormat, stored_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[rows, groups]`` of a chunk laid out by group, ``[groups, rows, width]``."""
    # Every grid holds the value zero, because its zero point is one of its codes.
    lowest, highest = weight.amin(-1).clamp_max(0), weight.amax(-1).clamp_min(0)
    span = highest - lowest
    span = torch.where(span > 0, span, torch.ones_like(span))
    steps = quant_format.max_code - quant_format.min_code
    start = quant_format.min_code - torch.round(lowest / span * steps)
    zeros = (start + _constants(ZERO_OFFSETS, start.device)).clamp(quant_format.min_code, quant_format.max_code)
    low, high = LOWEST_RATIO * span / steps, span / steps
    search = _Search(weight, importance, quant_format, stored_dtype, low, high - low)
    best = search.attempt(search.start(zeros[0]), _coarse_places(span), zeros)
    best = search.attempt(best, _fine_places(best.place), zeros)
    return best.scale.t(), best.zero.t().to(torch.int8)


def _coarse_places(like: Tensor) -> Tensor:
    """Where between its limits each candidate lies, the largest first: ``[COARSE_STEPS, groups, rows]``."""
    places = tuple(1 - index / (COARSE_STEPS - 1) for index in range(COARSE_STEPS))
    return _constants(places, like.device).expand(-1, *like.shape)


def _fine_places(centre: Tensor) -> Tensor:
    """Places around the best coarse one, closer than its neighbours: ``[2 FINE_STEPS, groups, rows]``."""
    spacing = 1 / (COARSE_STEPS - 1)
    shifts = tuple(spacing * index / (FINE_STEPS + 1) for index in range(-FINE_STEPS, FINE_STEPS + 1) if index)
    return (centre + _constants(shifts, centre.device)).clamp(0, 1)


@lru_cache(maxsize=16)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as ``[values, 1, 1]`` float32 on a device, where they stay.

    To copy them anew would wait for all work that a GPU has been given: output feedback searches 32 times per layer.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


class _Best(NamedTuple):
    """The best candidate so far of each group and row, ``[groups, rows]`` each."""

    error: Tensor
    scale: Tensor
    place: Tensor
    zero: Tensor


class _Search:
    """Weighted squared error of one chunk, ``[groups, rows, width]``, for candidates.

    Args:
        weight: The chunk, float32.
        importance: ``[groups, width]`` float32.
        fmt: Range of the codes.
        stored_dtype: dtype of the scales.
        low: ``[groups, rows]``, the scale of place 0.
        span: ``[groups, rows]``, what place 1 adds to it.
    """

    def __init__(
        self,
        weight: Tensor,
        importance: Tensor,
        fmt: QuantFormat,
        stored_dtype: torch.dtype,
        low: Tensor,
        span: Tensor,
    ) -> None:
        self.weight, self.importance, self.fmt = weight, importance, fmt
        self.stored_dtype, self.low, self.span = stored_dtype, low, span

    def start(self, zero: Tensor) -> _Best:
        """Any finite error improves on it; it stays where no candidate can be stored.

        Weights that small are as good as zero, and get code zero.
        """
        scale = torch.ones_like(self.low, dtype=self.stored_dtype)
        return _Best(torch.full_like(self.low, float("inf")), scale, torch.zeros_like(self.low), zero)

    def attempt(self, best: _Best, place: Tensor, zeros: Tensor) -> _Best:
        """The first of the smallest errors of scales at ``[places, groups, rows]``, each with every zero point.

        The present best comes before all.
        """
        scale = torch.addcmul(self.low, self.span, place).to(self.stored_dtype)
        steps = scale.to(self.weight.dtype)
        # Only zero, and scales whose float32 reciprocal overflows, are unusable: subnormal fp16 scales are coarse,
        # but their error is measured as they are stored. NaN never wins.
        steps = steps.masked_fill(steps < torch.finfo(torch.float32).tiny, float("nan"))
        error, number = self._least(steps, zeros)
        better = error < best.error

        def pick(present: Tensor, candidates: Tensor, index: Tensor) -> Tensor:
            return torch.where(better, candidates.gather(0, index[None])[0], present)

        scale_number = number.div(len(zeros), rounding_mode="floor")
        return _Best(
            torch.where(better, error, best.error),
            pick(best.scale, scale, scale_number),
            pick(best.place, place, scale_number),
            pick(best.zero, zeros, number - scale_number * len(zeros)),
        )

    def _least(self, steps: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Least of the sums over a group of c (w - s (q - z))², and the number of the candidate that has it."""
        low, high = self.fmt.min_code, self.fmt.max_code
        fused = scale_search(self.weight.device)
        if fused is not None:
            return cast(
                tuple[Tensor, Tensor], fused.least_errors(self.weight, self.importance, steps, zeros, low, high)
            )
        # Codes less their zero: its only effect is to move their range.
        ranges = [((low - zero).unsqueeze(-1), (high - zero).unsqueeze(-1)) for zero in zeros]
        errors = torch.stack([error for step in steps for error in self._eager_errors(step, ranges)])
        return errors.nan_to_num_(nan=float("inf"), posinf=float("inf")).min(0)

    def _eager_errors(self, step: Tensor, ranges: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Error of one scale with each range of codes: ``[groups, rows]``."""
        scaled = self.weight * step.reciprocal().unsqueeze(-1)
        rounded = scaled.round()
        for lowest, highest in ranges:
            difference = torch.clamp(rounded, lowest, highest).sub_(scaled).square_()
            # A row times a matrix: the matrix times a column took five times as long in MKL.
            sums = torch.bmm(self.importance.unsqueeze(1), difference.transpose(1, 2))
            yield sums.squeeze(1) * step.square()


def expand_scales(scales: Tensor, columns: int) -> Tensor:
    """``[out, groups]`` scales or zero points of any dtype as float32 per column, ``[out, in]``."""
    return scales.float().repeat_interleave(columns // scales.shape[1], dim=1)


def nearest_codes(weight: Tensor, scales: Tensor, quant_format: QuantFormat, zeros: Tensor | None = None) -> Tensor:
    """Plain rounding: ``clamp(round(w / s) + z)`` as ``[out, in]`` int8, or the nearest floats (half to even)."""
    return codes_of_steps(weight / expand_scales(scales, weight.shape[1]), quant_format, zeros)


def codes_of_steps(in_steps: Tensor, quant_format: QuantFormat, zeros: Tensor | None = None) -> Tensor:
    """Codes, as of `nearest_codes`, of weights over their scales, which are used up."""
    if quant_format.floats is not None:
        return ELEMENTS[quant_format.floats.element].nearest_(in_steps).to(CODE_DTYPE)
    levels = in_steps.round_()
    if zeros is not None:
        levels += expand_scales(zeros, levels.shape[1])
    return levels.clamp_(quant_format.min_code, quant_format.max_code).to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None = None, divisor: float | None = None) -> Tensor:
    """Weights as loaders compute them: code, less its zero point if there is one, times scale, in the scale's dtype.

    Args:
        codes: ``[out, in]`` int8 or float8_e4m3fn.
        scales: ``[out, groups]`` in the stored dtype; in float32 for the values of the grid as rounding sees them.
        zeros: ``[out, groups]`` int8; None on a symmetric grid.
        divisor: Of no effect: scales have been divided by it.

    Returns:
        ``[out, in]`` in the scale's dtype.
    """
    rows, columns = codes.shape
    grouped = codes.to(scales.dtype).view(rows, scales.shape[1], columns // max(scales.shape[1], 1))
    if zeros is not None:
        # Exact even in bf16: 8-bit differences lie within ±255.
        grouped = grouped - zeros.to(scales.dtype).unsqueeze(-1)
    return (grouped * scales.unsqueeze(-1)).view(rows, columns)


def clip_rate(in_steps: Tensor, result: Quantized, fmt: QuantFormat) -> Tensor:
    """Share of the weights, given in steps of their grid, that lie more than half a step outside: ``[]`` float32."""
    levels = result.codes.float()  # comparing int8 takes four times as long on a CPU
    if fmt.floats is not None:
        return torch.count_nonzero(ELEMENTS[fmt.floats.element].beyond(levels, in_steps)) / in_steps.numel()
    at_bound = (levels == fmt.min_code) | (levels == fmt.max_code)
    if result.zeros is not None:
        levels -= expand_scales(result.zeros, in_steps.shape[1])
    beyond = levels.sub_(in_steps).abs_() > 0.5
    return torch.count_nonzero(at_bound.logical_and_(beyond)) / in_steps.numel()
