"""Menu, budget and plan of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hawqtool.allocation.problem import AllocationProblem, stored_bytes
from hawqtool.allocation.second_cost import active_bytes, second_cost
from hawqtool.allocation.special_formats import fits
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.formats import CHANNEL, GROUP_SIZES, names_width, parse_label
from hawqtool.pipeline.run.job import Job
from hawqtool.records import BitPlan, Menu, Unit, UnitFormats, UnitScores
from hawqtool.values import parse_size

if TYPE_CHECKING:
    from hawqtool.allocation.exact import SecondCost

NARROW_MENU, WIDE_MENU, FINE_MENU = (4, 8), (2, 3, 4, 8), (4, 5, 6, 8)
WIDEST = 8
"""At this width groups cost bytes and lower no loss that counts: whole rows alone."""

BELOW, ABOVE = 1.0, 1.25
"""Bits per weight around the budget in which all group sizes are worth measuring.

Of a width that lies above, the smallest format is a unit's escape; of one that lies below, the finest."""

_EXPERT_ROWS = (4, 8)
"""Widths at which vLLM's kernels take whole rows in experts, by its source."""


def budget_bytes(config: RunConfig, units: Sequence[Unit], unquantized_bytes: int, pins: UnitFormats) -> int:
    """Most stored bytes of the quantized linears that the target allows.

    Args:
        config: With ``target_bpw``, ``target_size``, or one width alone.
        units: Units that are quantized.
        unquantized_bytes: Bytes of the output files that no plan changes.
        pins: Fixed formats by unit, which count where one width is all that is asked for.
    """
    if config.uniform_format is not None:
        whole = format_menu(units, widths(config, units, None), config)
        return stored_bytes(units, {**{unit: formats[0] for unit, formats in whole.items()}, **pins})
    if config.uniform_width is not None:
        uniform = uniform_formats(units, config.uniform_width, config.base_group_size, config.symmetric)
        return stored_bytes(units, {**uniform, **pins})
    if config.target_bpw is not None:
        return AllocationProblem({}, sum(unit.num_weights for unit in units)).budget_bytes(config.target_bpw)
    assert config.target_size is not None  # require_one_target saw to it
    return parse_size(config.target_size) - unquantized_bytes


def second_budget(config: RunConfig, units: Sequence[Unit], menu: Menu, pins: UnitFormats) -> SecondCost | None:
    """The second budget of a run; None if it has none.

    Raises:
        InputError: If the file of costs is damaged.
        UsageError: If it lacks costs, or even the cheapest formats exceed the budget.
    """
    if config.max_active is not None:
        return active_bytes(parse_size(config.max_active), units, menu, pins)
    if config.costs is None or config.max_cost is None:
        return None
    return second_cost(config.costs, config.max_cost, units, menu, pins)


def within_second_budget(config: RunConfig, units: Sequence[Unit], plan: BitPlan) -> BitPlan | None:
    """A plan from elsewhere, such as a uniform one, with its second cost.

    Returns:
        The plan; None if it is not known to stay within the second budget of the run.
    """
    try:
        second = second_budget(config, units, {unit: (fmt,) for unit, fmt in plan.formats.items()}, {})
    except UsageError:  # too dear, or a format that the file does not know
        return None
    if second is None:
        return plan
    if not second.allows(plan.formats):
        return None
    return replace(plan, cost=second.total(plan.formats), max_cost=second.limit)


def widths(config: RunConfig, units: Sequence[Unit], budget: int | None) -> tuple[int, ...]:
    """Widths to choose from: those asked for, else 4 and 8 where the budget allows 4 bits everywhere.

    With widths 4 and 8 all engines load the result; narrower budgets need 2 and 3 bits as well. transformers unpacks
    all widths alike, so that for it alone 5 and 6 come in where the budget allows 5 everywhere.
    """
    if config.given_widths is not None:
        return config.given_widths

    def allows(width: int) -> bool:
        uniform = uniform_formats(units, width, config.base_group_size, config.symmetric)
        return budget is not None and budget >= stored_bytes(units, uniform)

    if config.profile == "transformers" and allows(5):
        return FINE_MENU
    return NARROW_MENU if config.profile == "portable" or allows(4) else WIDE_MENU


def format_menu(units: Sequence[Unit], bits: Sequence[int], config: RunConfig, bpw: float | None = None) -> Menu:
    """Formats that each unit may take, by rising width, the configuration's own group size first at each.

    Group sizes fall where they do not divide; of formats made equal by that one is kept.

    Args:
        units: Units that are quantized.
        bits: Widths.
        config: The run's configuration.
        bpw: Budget in stored bits per weight, where it is known: group sizes that no good plan has are left out.
    """
    kinds = [kind for width in bits for kind in _kinds(config, width, bpw)]
    plans = [uniform_formats(units, width, size, config.symmetric) for width, size in kinds]
    menu = {unit.name: tuple(dict.fromkeys(formats[unit.name] for formats in plans)) for unit in units}
    for unit in units if config.special_formats else ():
        special = (fmt for fmt in config.special_formats if fits(unit, fmt))
        menu[unit.name] = tuple(sorted((*menu[unit.name], *special), key=unit.stored_bytes))
    if not config.chooses_groups:
        return menu
    for unit in (unit for unit in units if any(is_expert(member.name) for member in unit.members)):
        taken = (f for f in menu[unit.name] if f.group_size != CHANNEL or f.bits in _EXPERT_ROWS)
        menu[unit.name] = tuple(taken) or menu[unit.name]
    return menu


def _kinds(config: RunConfig, width: int, bpw: float | None) -> list[tuple[int, int]]:
    """Width and group size of the formats of one width."""
    if config.formats is not None:
        plain = [parse_label(label) for label in config.formats if not names_width(label)]
        named = [fmt.group_size for fmt in plain if fmt.is_plain and fmt.bits == width]
        whole = f"w{width}" in config.formats
        return [(width, size) for size in dict.fromkeys((*named, *(_SERVED if whole else ())))]
    if not config.chooses_groups:
        return [(width, size) for size in config.group_sizes]
    if config.uniform_width is not None:
        return [(width, config.base_group_size)]
    if width == WIDEST:
        return [(width, CHANNEL)]
    if bpw is None:
        return [(width, size) for size in _SERVED]
    near = [size for size in _SERVED if bpw - BELOW <= width + _scale_bits(size) <= bpw + ABOVE]
    return [(width, size) for size in near or [min(GROUP_SIZES) if width < bpw else CHANNEL]]


_SERVED = (*GROUP_SIZES, CHANNEL)


def _scale_bits(group_size: int) -> float:
    """Bits per weight of 16-bit scales; nothing to speak of for whole rows."""
    return 16 / group_size if group_size else 0.0


def measured_menu(units: Sequence[Unit], bits: Sequence[int], scores: UnitScores) -> Menu:
    """All formats of these widths that were measured, by unit."""
    found = {unit.name: sorted(map(parse_label, scores.get(unit.name, {}))) for unit in units}
    return {name: tuple(fmt for fmt in formats if fmt.bits in bits) for name, formats in found.items()}


def unquantized_bytes(job: Job, menu: Menu) -> int:
    """Bytes of the output files beside packed codes and scales; the longest header is assumed."""
    kinds = {unit: [fmt for fmt in formats if not fmt.is_unquantized] or formats for unit, formats in menu.items()}
    widest = {unit.name: max((*kinds[unit.name], *job.pins.values())) for unit in job.units}
    return job.layout(widest).total_bytes - stored_bytes(job.units, widest)


def job_menu(job: Job, budget: int | None) -> Menu:
    """Formats of each unit under the configuration's widths and budget."""
    config = job.config
    bpw = None if budget is None else 8 * budget / max(1, sum(unit.num_weights for unit in job.units))
    return format_menu(job.units, widths(config, job.units, budget), config, bpw)
