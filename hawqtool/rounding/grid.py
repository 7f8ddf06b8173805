"""Scales of symmetric grids, searched against the error that matters.

All candidates are cast to the stored dtype before their error is measured, so the file holds exactly
the scales that won (casting afterwards costs 1 to 2 % at 8 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.formats import QuantFormat

COARSE_STEPS = 20
FINE_STEPS = 4
LOWEST_RATIO = 0.3
_CHUNK_ELEMENTS = 1 << 21
"""Rows are searched in chunks of about this many weights: smaller ones lose more to calls than they gain in cache
(measured on two cores: 0.27 s at 2^17, 0.075 s at 2^21 for 3072 x 576), larger ones only take memory."""


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
        column_weights: ``[in]`` float32, the damped diagonal of the Gram matrix (ones: unweighted).
        quant_format: Width and group size.
        stored_dtype: dtype in which the scales are stored.
        both_signs: Allow negative scales.

    Returns:
        ``[out, groups]`` in ``stored_dtype``.
    """
    rows, columns = weight.shape
    width = quant_format.group_width(columns)
    groups = columns // width
    importance = column_weights.view(groups, width)
    step = max(1, _CHUNK_ELEMENTS // columns) if weight.device.type == "cpu" else rows
    found = [
        _search_chunk(
            chunk.reshape(-1, groups, width).transpose(0, 1).contiguous(),
            importance,
            quant_format,
            stored_dtype,
            both_signs,
        )
        for chunk in weight.split(step)
    ]
    return torch.cat(found)


def _search_chunk(
    weight: Tensor, importance: Tensor, quant_format: QuantFormat, stored_dtype: torch.dtype, both_signs: bool
) -> Tensor:
    """Scales ``[rows, groups]`` of a chunk laid out by group, ``[groups, rows, width]``."""
    peak = weight.abs().amax(-1)
    # An all-zero group keeps a positive scale, so that its codes are zero and nothing divides by zero.
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    low = LOWEST_RATIO * peak / (quant_format.max_code + 0.5)
    high = peak / max(quant_format.max_code, 0.5)
    best_error = torch.full_like(peak, float("inf"))
    # Stays where no candidate can be stored: weights that small are as good as zero, and get code zero.
    best_scale = torch.ones_like(peak, dtype=stored_dtype)
    best_place = torch.zeros_like(peak)
    search = _Search(weight, importance, quant_format)
    signs = (1.0, -1.0) if both_signs else (1.0,)

    def attempt(place: Tensor, sign: Tensor | float) -> None:
        nonlocal best_error, best_scale, best_place
        scale = ((low + (high - low) * place) * sign).to(stored_dtype)
        error = search.error(scale)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_place = torch.where(better, place, best_place)

    for index in range(COARSE_STEPS):
        place = torch.full_like(peak, 1 - index / (COARSE_STEPS - 1))
        for direction in signs:
            attempt(place, direction)
    spacing = 1 / (COARSE_STEPS - 1)
    centre, sign = best_place, torch.sign(best_scale.to(peak.dtype))
    for index in range(-FINE_STEPS, FINE_STEPS + 1):
        if index:
            attempt((centre + spacing * index / (FINE_STEPS + 1)).clamp(0, 1), sign)
    return best_scale.t()


class _Search:
    """Weighted squared error of one chunk for a candidate scale, with buffers that are reused."""

    def __init__(self, weight: Tensor, importance: Tensor, fmt: QuantFormat) -> None:
        self.weight, self.importance, self.fmt = weight, importance.unsqueeze(-1), fmt
        # Only zero, and scales whose float32 reciprocal overflows, are unusable: subnormal fp16 scales are coarse,
        # but their error is measured as they are stored.
        self.tiny = torch.finfo(torch.float32).tiny
        self.scaled, self.codes = torch.empty_like(weight), torch.empty_like(weight)

    def error(self, scale: Tensor) -> Tensor:
        """Sum over each group of c (w - s q)²: ``[groups, rows]``."""
        step = scale.to(self.weight.dtype)
        usable = step.abs() >= self.tiny
        torch.mul(self.weight, step.reciprocal().unsqueeze(-1), out=self.scaled)
        torch.round(self.scaled, out=self.codes)
        self.codes.clamp_(self.fmt.min_code, self.fmt.max_code)
        self.codes.sub_(self.scaled).square_()
        error = torch.bmm(self.codes, self.importance).squeeze(-1) * step.square()
        return torch.where(usable, error, torch.full_like(error, float("inf")))


def expand_scales(scales: Tensor, columns: int) -> Tensor:
    """``[out, groups]`` scales of any dtype as float32 per column, ``[out, in]``."""
    return scales.float().repeat_interleave(columns // scales.shape[1], dim=1)


def nearest_codes(weight: Tensor, scales: Tensor, quant_format: QuantFormat) -> Tensor:
    """Plain rounding: ``clamp(round(w / s))`` as ``[out, in]`` int8 (half to even)."""
    codes = torch.round(weight / expand_scales(scales, weight.shape[1]))
    return codes.clamp_(quant_format.min_code, quant_format.max_code).to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Weights as loaders compute them: codes times scales in the dtype of the scales, ``[out, in]``."""
    rows, columns = codes.shape
    grouped = codes.to(scales.dtype).view(rows, scales.shape[1], -1)
    return (grouped * scales.unsqueeze(-1)).view(rows, columns)
