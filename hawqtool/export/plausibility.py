"""Bounds on what rounding can have done to a weight, whatever the records of a folder say.

A grid of 2^b codes over the range r of a group has steps s = r / (2^b - 1), r being twice the largest magnitude on a
symmetric grid, so nearest rounding errs by at most s / 2 in each of the n weights of a scale: n s² / 4 in all. Scale
search only lowers that. Compensated rounding moves errors between columns and adds to them; in runs of every method on
several models it reached 0.8 of this bound for whole modules and 1.6 for rows. Output feedback moves errors of loud
rows into others as well: of a query projection whose rows differ by a factor of 10⁴, one row had 14 times its bound
at 3 bits, 10 times that of a row of mean energy. The limits below leave a part or a multiple of that; codes that were
drawn at random, or belong to another weight, are far beyond those of the module, and a row of zeros is beyond its own
from 4 bits on. The error of a single group has no limit: in a real model's quiet ones, feedback and shifted targets
gave four times the energy of the weights at 4 bits. But such errors come from other weights and have no reason to lie
along those of the group. A scale that is not that of its codes does just that: its group is a multiple of the source's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.formats.grids import WeightGrid
from hawqtool.rounding.floats.elements import ELEMENTS

MODULE_LIMIT, ROW_LIMIT = 2.5, 12.0
"""Squared error over the bound of nearest rounding, at most, of a module and a row."""

MODULE_ENERGY, ROW_ENERGY = 0.9, 4.0
"""Squared error over squared weights, at most: zeros in place of the weights would give 1. It counts at 2 and 3 bits,
where the bound of nearest rounding is no smaller."""

MODULE_COARSE, ROW_COARSE = 0.75, ROW_LIMIT
"""Squared error over the bound of nearest rounding that energies never forbid. One large weight can make the step of a
row wider than all else in it; what columns then hand on to each other is of a step's size, and stays so in the codes.
MPNet's loudest channel in whole rows at 3 bits: 16 times the energy of the row, 0.66 of the module's, and 0.36 and 0.21
of the bounds. What feedback carries from row to row is of a mean row's step too, which at 2 bits is as wide as its
weights: of SmolLM2's first query projection, distilled, a row erred by 4.7 times a mean row's energy."""

QUIET = 0.25
"""Rows below this share of the mean are judged as if they had it where corrections count: shifted targets may fill a
quiet one. Feedback carries errors from row to row, which are as large as the grids' steps: what a mean row's grid may
err, and a mean row's energy at most, is allowed in each."""

MODULE_CORRECTION, ROW_CORRECTION = 0.15, 0.5
"""Squared change over squared weights, at most, that is no rounding: targets that make up for errors of earlier layers
(GPTAQ, target shift), learned codes and scales, products that round to bfloat16. At 8 bits it is all that counts: there
targets that make up wholly for layers of 2 bits reached 0.03 of a module."""

MULTIPLE_LIMIT = 1.7
"""Multiple of its source's weights that a group may be; 1.3 was seen. Clipping makes it smaller: where one large weight
met a column that hardly counts, 0.6 was left of a group."""

MULTIPLE_REST = 0.08
"""Share of a group's squared values that may be no multiple of its source's weights where it counts as one: about what
nearest rounding gives at 3 bits. At 2 bits it gives more: there only errors along the weights by chance would count."""

LEAST_WIDTH, LEAST_BITS = 32, 3
"""Weights of a group and bits of a code, at least, where multiples are looked for: the error of n weights that knows
nothing of them lies along them but for a third with a chance of 0.32^((n - 1) / 2), 2 in 10⁸ of 32."""

GAIN_LIMIT = 0.8
"""Change of a learned norm gain, at most, over the larger of its magnitude and the tensor's root mean square."""


def half_step_bounds(weight: Tensor, quant_format: QuantFormat) -> Tensor:
    """Squared error of nearest rounding, at most, per scale.

    Args:
        weight: ``[out, in]``, any floating dtype.
        quant_format: Format with groups that divide the columns.

    Returns:
        ``[out, groups]`` float32.
    """
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, quant_format.num_groups(columns), -1)
    if quant_format.floats is not None:
        return _float_bounds(grouped, quant_format.floats)
    if quant_format.symmetric:
        extent = 2 * grouped.abs().amax(-1)
    else:
        extent = grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0)
    return grouped.shape[-1] * (extent / (2**quant_format.bits - 1) / 2).square()


def _float_bounds(grouped: Tensor, grid: WeightGrid) -> Tensor:
    """`half_step_bounds` of floats, whose steps are largest at the largest code; powers of two may double it."""
    element = ELEMENTS[grid.element]
    peak = grouped.abs().amax(-1)
    if grid.group_rows > 1:
        peak = peak.view(-1, grid.group_rows, peak.shape[1]).amax(1).repeat_interleave(grid.group_rows, dim=0)
    half_step = float(element.spacing(torch.tensor(element.largest))) / 2 * (2 if grid.scale == "e8m0" else 1)
    return grouped.shape[-1] * (peak * half_step / element.largest).square()


def error_bound_problems(module: str, error: Tensor, energy: Tensor, bound: Tensor) -> list[str]:
    """What of a packed module cannot be the rounding of the source's weight: the module, else a row.

    Args:
        module: Its name.
        error: Squared error per scale, ``[out, groups]``.
        energy: Squared weights per scale, ``[out, groups]``.
        bound: From `half_step_bounds`, ``[out, groups]``.
    """
    error, energy, bound = error.double(), energy.double(), bound.double()
    for place, axes, limit, correction, most, coarse in (
        ("the module", (0, 1), MODULE_LIMIT, MODULE_CORRECTION, MODULE_ENERGY, MODULE_COARSE),
        ("row", (1,), ROW_LIMIT, ROW_CORRECTION, ROW_ENERGY, ROW_COARSE),
    ):
        found, of_weights, of_grid = (values.sum(axes) for values in (error, energy, bound))
        energies = _loud(of_weights, 1.0)
        rounding, corrections = limit * _loud(of_grid, 1.0), correction * _loud(of_weights, QUIET)
        allowed = torch.minimum(rounding + corrections, torch.maximum(most * energies, coarse * _loud(of_grid, 1.0)))
        # Not "found > allowed": a NaN must count as a problem.
        wrong = (~(found <= allowed)).reshape(found.shape).nonzero()
        if len(wrong):
            where = tuple(wrong[0].tolist())
            relative = float(found[where] / energies[where].clamp_min(torch.finfo(torch.float64).tiny))
            numbers = f"{place} {', '.join(map(str, where))}".strip()
            return [
                f"{module}: {numbers} has relative squared weight error {relative:.3g}; rounding to this format gives "
                f"at most {float((allowed / energies.clamp_min(1e-300))[where]):.3g}; "
                "codes or scales are not those of this weight"
            ]
    return []


def _loud(values: Tensor, share: float) -> Tensor:
    """Values of rows, raised to a share of their mean; that of a module as it is."""
    return torch.maximum(values, share * values.mean())


def scale_multiples(weight: Tensor, restored: Tensor, error: Tensor, energy: Tensor, bits: int) -> Tensor:
    """What multiple of the source's weights each group is; 1 where it errs little or is no multiple of them.

    It is the m of the ``m w`` nearest to the rounded weights q, where ``|q - m w|²`` is at most `MULTIPLE_REST` of
    ``|q|²``. One weight may be most of a group: the error of such a group lies along its weights whatever its cause. So
    it counts no further than the group without the largest eighth of its weights is a multiple.

    Args:
        weight: ``[out, in]`` float32.
        restored: ``[out, in]`` float32, the rounded weights.
        error: Squared error per scale, ``[out, groups]`` float32.
        energy: Squared weights per scale, ``[out, groups]`` float32.
        bits: Width of the codes.

    Returns:
        ``[out, groups]`` float32.
    """
    width = weight.shape[1] // max(error.shape[1], 1)
    suspects = error > (MULTIPLE_LIMIT - 1) ** 2 * energy
    multiple = torch.ones_like(error)
    if width < LEAST_WIDTH or bits < LEAST_BITS or not bool(suspects.any()):
        return multiple
    original, rounded = (values.view(*error.shape, width)[suspects] for values in (weight, restored))
    product, squares = (original * rounded).sum(-1), original.square().sum(-1)
    near = product.square() >= (1 - MULTIPLE_REST) * rounded.square().sum(-1) * squares
    whole = torch.where((product > 0) & near, product / squares, 1.0)
    others = original.scatter(-1, original.abs().topk(width // 8).indices, 0.0)
    of_others = (others * rounded).sum(-1) / others.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    multiple[suspects] = torch.minimum(whole, of_others)
    return multiple


def multiple_problems(module: str, multiple: Tensor) -> list[str]:
    """The first group whose codes are the source's and whose scale is not.

    Args:
        module: Its name.
        multiple: From `scale_multiples`, ``[out, groups]``.
    """
    wrong = (multiple > MULTIPLE_LIMIT).nonzero()
    if not len(wrong):
        return []
    row, group = wrong[0].tolist()
    return [
        f"{module}: row {row}, group {group} is {float(multiple[row, group]):.3g} times the source's weights; rounding "
        f"gives at most {MULTIPLE_LIMIT} times; this scale is not that of these codes"
    ]


def gain_problems(name: str, gain: Tensor, source: Tensor) -> list[str]:
    """A learned norm gain that is not near the source's.

    Args:
        name: Its name.
        gain: Any floating dtype and shape.
        source: The source's, of equal shape.
    """
    found, original = gain.double(), source.double()
    scale = torch.maximum(original.abs(), original.square().mean().sqrt()).clamp_min(torch.finfo(torch.float32).tiny)
    change = float(((found - original).abs() / scale).amax()) if found.numel() else 0.0
    if change <= GAIN_LIMIT:
        return []
    return [
        f"tensor {name} is recorded as learned and differs by {change:.3g} of the source's gain; expected at most "
        f"{GAIN_LIMIT}; it is not what training of these steps gives"
    ]
