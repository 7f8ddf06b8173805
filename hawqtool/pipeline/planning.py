"""Menu, budget and plan of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import AllocationProblem, build_problem
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import ASYMMETRIC_PROFILES, RunConfig, asymmetric_refusal, group_size_refusal
from hawqtool.errors import UsageError
from hawqtool.formats import QuantFormat, is_served
from hawqtool.pipeline.artifacts import read_plan
from hawqtool.pipeline.costs import second_cost
from hawqtool.records import BitPlan, Score, Unit
from hawqtool.values import parse_size

EXACT_UNITS = 500
"""Units up to which ``auto`` solves exactly: fractions of a second; from some 800 on it may take 20 s and more."""

NARROW_MENU, WIDE_MENU = (4, 8), (2, 3, 4, 8)


def stored_bytes(units: Sequence[Unit], formats: Mapping[str, QuantFormat]) -> int:
    """Stored bytes of formats by unit."""
    return sum(unit.stored_bytes(formats[unit.name]) for unit in units)


def score_warnings(scores: Mapping[str, Mapping[str, Mapping[str, Score]]]) -> tuple[str, ...]:
    """What the user should know of scores ``[metric][unit][format label]``: which of the true Hessian are negative.

    Such scores stay as they are, since the Hessian is indefinite; but a sum of them is no loss to be made small.
    """
    by_unit = scores.get("hawq", {})
    negative = [unit for unit, by_label in by_unit.items() if any(score.value < 0 for score in by_label.values())]
    if not negative:
        return ()
    return (
        f"{len(negative)} of {len(by_unit)} units have a negative hawq score (first {negative[0]}), as the mean trace "
        "of their Hessian is negative: allocation with --sensitivity hawq would give them the fewest bits; prefer "
        "hawq-ggn, whose trace is never negative, or measure with more --probes",
    )


def budget_bytes(config: RunConfig, units: Sequence[Unit], unquantized_bytes: int) -> int:
    """Most stored bytes of the quantized linears that the target allows.

    Args:
        config: With ``target_bpw`` or ``target_size``.
        units: Units that are quantized.
        unquantized_bytes: Bytes of the output files that no plan changes.
    """
    if config.target_bpw is not None:
        return AllocationProblem({}, sum(unit.num_weights for unit in units)).budget_bytes(config.target_bpw)
    assert config.target_size is not None  # require_one_target saw to it
    return parse_size(config.target_size) - unquantized_bytes


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


def format_menu(units: Sequence[Unit], bits: Sequence[int], config: RunConfig) -> dict[str, tuple[QuantFormat, ...]]:
    """Formats that each unit may take, by rising width, the configuration's own group size first at each.

    Group sizes fall where they do not divide; of formats made equal by that one is kept.
    """
    plans = [uniform_formats(units, width, size, config.symmetric) for width in bits for size in config.group_sizes]
    return {unit.name: tuple(dict.fromkeys(formats[unit.name] for formats in plans)) for unit in units}


def given_plan(config: RunConfig, units: tuple[Unit, ...]) -> BitPlan:
    """The plan of the file that ``config.plan`` names.

    Raises:
        InputError: If the file is damaged.
        UsageError: If it does not fit the model, or has asymmetric layers that the profile does not take.
    """
    plan = read_plan(Path(config.plan or ""), units)
    if not plan.symmetric and config.profile not in ASYMMETRIC_PROFILES:
        first = next(name for name, fmt in plan.formats.items() if not fmt.symmetric)
        raise UsageError(f"{config.plan}: {first} is asymmetric; {asymmetric_refusal(config.profile)}")
    odd = next((fmt.group_size for fmt in plan.formats.values() if not is_served(fmt.group_size)), None)
    if odd is not None and config.profile != "transformers":
        raise UsageError(f"{config.plan}: {group_size_refusal(odd)}")
    return plan


def allocate(
    units: Sequence[Unit],
    menu: Mapping[str, tuple[QuantFormat, ...]],
    scores: Mapping[str, Mapping[str, Score]],
    pins: Mapping[str, QuantFormat],
    budget: int,
    metric: str,
    config: RunConfig,
) -> BitPlan:
    """The plan of least predicted loss within the budget and the second one of ``config``, by its solver.

    Raises:
        InputError: If the file of costs is damaged.
        UsageError: If the budgets cannot be met, stating the achievable range, or costs are missing.
        NumericalError: If no plan that meets both budgets was found in time.
    """
    problem = build_problem(units, menu, scores, pins)
    second = second_cost(config, units, menu, pins)
    large = second is None and len(problem.choices) > EXACT_UNITS
    if config.solver == "hull" or (config.solver == "auto" and large):
        return solve(problem, budget, metric)
    from hawqtool.allocation.exact import solve as solve_exactly  # scipy takes long to import

    return solve_exactly(problem, budget, metric, second=second)


def plan_warnings(plan: BitPlan) -> list[str]:
    """What the user should know of how a plan was found: that the exact solver was stopped."""
    if not plan.solver or not plan.solver.startswith("exact ("):
        return []
    reason = plan.solver.removeprefix("exact (").removesuffix(")")
    within = "no bound is known" if plan.gap is None else f"it is within {100 * plan.gap:.2g} % of the optimum"
    return [f"the plan's optimality was not proven ({reason}); its predicted loss is the best found, {within}"]


def single_choice_plan(
    units: Sequence[Unit],
    menu: Mapping[str, tuple[QuantFormat, ...]],
    pins: Mapping[str, QuantFormat],
    budget: int,
    config: RunConfig,
) -> BitPlan | None:
    """The plan when no unit has a choice, so that nothing needs to be measured; None otherwise.

    Raises:
        UsageError: If it exceeds a budget.
    """
    if any(len(menu[unit.name]) > 1 and unit.name not in pins for unit in units):
        return None
    fixed = {unit.name: pins.get(unit.name, menu[unit.name][0]) for unit in units}
    plan = solve(build_problem(units, {}, {}, fixed), budget)
    second = second_cost(config, units, menu, fixed)
    return plan if second is None else replace(plan, cost=second.total(fixed), max_cost=second.limit)


def predicted_loss(
    formats: Mapping[str, QuantFormat], scores: Mapping[str, Mapping[str, Score]], pins: Mapping[str, QuantFormat]
) -> float | None:
    """Sum of the scores of formats by unit, None if one of them was not measured; pins need no score, as in plans."""
    found = []
    for unit, fmt in formats.items():
        score = scores[unit].get(fmt.label) if unit in scores else None
        if score is None and pins.get(unit) != fmt:
            return None
        found.append(0.0 if score is None else score.value)
    return math.fsum(found)


def achievable(
    units: Sequence[Unit], menu: Mapping[str, tuple[QuantFormat, ...]], pins: Mapping[str, QuantFormat]
) -> tuple[int, int]:
    """Least and most stored bytes that the menu and the pins allow."""
    lowest = highest = 0
    for unit in units:
        sizes = [unit.stored_bytes(f) for f in ((pins[unit.name],) if unit.name in pins else menu[unit.name])]
        lowest, highest = lowest + min(sizes), highest + max(sizes)
    return lowest, highest
