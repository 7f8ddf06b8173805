"""Weights that lie on a grid already, because they come from a quantized original: their codes and scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.rounding.grid import Quantized

_LEAST_CODES = 8
"""Largest code that the smallest weight of a group is taken for: that of 4 bits."""

_NEIGHBOURS = (0.0, -0.75, 0.75)
"""Neighbours of a scale in its dtype, in its epsilon: what is found from a rounded weight may be off by one."""


def on_grid(weight: Tensor, quant_format: QuantFormat, stored_dtype: torch.dtype) -> Quantized | None:
    """Codes and scales that give a weight to the bit; None where there are none.

    Args:
        weight: ``[out, in]`` float32, exact in the stored dtype.
        quant_format: Width and group size; grids of floats, or with zero points, are not looked for.
        stored_dtype: dtype of the scales and of the weight as it is stored.
    """
    if not begin_on_grid([weight], quant_format, stored_dtype)[0]:
        return None
    scales, found = _search(weight, quant_format, stored_dtype)
    if not bool(found.all()):
        return None
    groups = weight.unflatten(1, (scales.shape[1], -1))
    return Quantized(_codes(groups, scales, quant_format).to(torch.int8).flatten(1), scales, None)


def begin_on_grid(weights: Sequence[Tensor], quant_format: QuantFormat, stored_dtype: torch.dtype) -> list[bool]:
    """Whether the first row of each of some weights lies on a grid: of nearly all it shows that the weight does not.

    Args:
        weights: ``[out, in]`` float32 each, all of one width; many are looked at for the price of one.
        quant_format: As for `on_grid`.
        stored_dtype: As for `on_grid`.
    """
    if not quant_format.symmetric or quant_format.grid or not all(map(len, weights)):
        return [False] * len(weights)
    _, found = _search(torch.stack([weight[0] for weight in weights]), quant_format, stored_dtype)
    return [bool(whole) for whole in found.all(1).tolist()]


def _search(weight: Tensor, quant_format: QuantFormat, stored_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales ``[out, groups]``, and whether they give the weights of their groups to the bit."""
    groups = weight.unflatten(1, (-1, quant_format.group_width(weight.shape[1])))
    sizes = groups.abs()
    least = torch.where(sizes > 0, sizes, torch.inf).amin(-1)
    found = torch.isinf(least)  # zeros lie on every grid
    scales = torch.ones_like(least).to(stored_dtype)
    least = torch.where(found, 1.0, least)
    epsilon = torch.finfo(stored_dtype).eps
    for code in range(1, min(_LEAST_CODES, -quant_format.min_code) + 1):
        nearest = (least / code).to(stored_dtype).float()
        for step in _NEIGHBOURS:
            scale = (nearest * (1 + step * epsilon)).to(stored_dtype)
            exact = (_values(groups, scale, quant_format) == groups).all(-1) & ~found
            scales, found = torch.where(exact, scale, scales), found | exact
    return scales, found


def _codes(groups: Tensor, scales: Tensor, quant_format: QuantFormat) -> Tensor:
    return (groups / scales.float()[..., None]).round_().clamp_(quant_format.min_code, quant_format.max_code)


def _values(groups: Tensor, scales: Tensor, quant_format: QuantFormat) -> Tensor:
    """The nearest values of the grid, rounded as they are when they are unpacked."""
    codes = _codes(groups, scales, quant_format)
    return codes.mul_(scales.float()[..., None]).to(scales.dtype).float()
