"""Menu, budget and plan of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hawqtool.allocation.problem import AllocationProblem, stored_bytes
from hawqtool.allocation.second_cost import second_cost
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.pipeline.run.job import Job
from hawqtool.records import Menu, Unit, UnitFormats
from hawqtool.values import parse_size

if TYPE_CHECKING:
    from hawqtool.allocation.exact import SecondCost

NARROW_MENU, WIDE_MENU = (4, 8), (2, 3, 4, 8)


def budget_bytes(config: RunConfig, units: Sequence[Unit], unquantized_bytes: int, pins: UnitFormats) -> int:
    """Most stored bytes of the quantized linears that the target allows.

    Args:
        config: With ``target_bpw``, ``target_size``, or one width alone.
        units: Units that are quantized.
        unquantized_bytes: Bytes of the output files that no plan changes.
        pins: Fixed formats by unit, which count where one width is all that is asked for.
    """
    if config.uniform_width is not None:
        uniform = uniform_formats(units, config.uniform_width, config.group_size, config.symmetric)
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
    if config.costs is None or config.max_cost is None:
        return None
    return second_cost(Path(config.costs), config.max_cost, units, menu, pins)


def meets_second_budget(config: RunConfig, units: Sequence[Unit], formats: UnitFormats) -> bool:
    """Whether a plan from elsewhere, such as a uniform one, is known to stay within the second budget of a run."""
    try:
        second = second_budget(config, units, {unit: (fmt,) for unit, fmt in formats.items()}, {})
    except UsageError:  # too dear, or a format that the file does not know
        return False
    return second is None or second.allows(formats)


def widths(config: RunConfig, units: Sequence[Unit], budget: int | None) -> tuple[int, ...]:
    """Widths to choose from: those asked for, else 4 and 8 where the budget allows 4 bits everywhere.

    With widths 4 and 8 all engines load the result; narrower budgets need 2 and 3 bits as well.
    """
    if config.bits is not None:
        return config.bits
    four = stored_bytes(units, uniform_formats(units, 4, config.group_size, config.symmetric))
    if config.profile == "portable" or (budget is not None and budget >= four):
        return NARROW_MENU
    return WIDE_MENU


def format_menu(units: Sequence[Unit], bits: Sequence[int], config: RunConfig) -> Menu:
    """Formats that each unit may take, by rising width, the configuration's own group size first at each.

    Group sizes fall where they do not divide; of formats made equal by that one is kept.
    """
    plans = [uniform_formats(units, width, size, config.symmetric) for width in bits for size in config.group_sizes]
    return {unit.name: tuple(dict.fromkeys(formats[unit.name] for formats in plans)) for unit in units}


def unquantized_bytes(job: Job, menu: Menu) -> int:
    """Bytes of the output files beside packed codes and scales; the longest header is assumed."""
    widest = {unit.name: max((*menu[unit.name], *job.pins.values())) for unit in job.units}
    return job.layout(widest).total_bytes - stored_bytes(job.units, widest)


def job_menu(job: Job, budget: int | None) -> Menu:
    """Formats of each unit under the configuration's widths and budget."""
    config = job.config
    return format_menu(job.units, widths(config, job.units, budget), config)
