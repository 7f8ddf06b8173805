"""Which plans a run tries: from scores that were measured or read once, for any budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from hawqtool.allocation.frontier import Frontier, frontier, solve
from hawqtool.allocation.problem import build_problem, predicted_loss
from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.formats import ASYMMETRIC_PROFILES, asymmetric_refusal, group_size_refusal, is_served
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import (
    SENSITIVITY_SCHEMA,
    parse_sensitivity,
    plan_of_record,
    plan_record,
    read_json,
    read_plan,
)
from hawqtool.pipeline.run.identity import model_fingerprint
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.menu import (
    budget_bytes,
    job_menu,
    measured_menu,
    second_budget,
    unquantized_bytes,
    widths,
    within_second_budget,
)
from hawqtool.pipeline.search.shortlist import RULE, alternatives, rule_plan
from hawqtool.pipeline.stages.measure import Origin, measured
from hawqtool.records import SWEEP_METRICS, BitPlan, Menu, Rows, SensitivityTable, Unit, UnitFormats, UnitScores
from hawqtool.report.documents import SensitivityDocument

EXACT_UNITS = 500
"""Units up to which ``auto`` solves exactly: fractions of a second; from some 800 on it may take 20 s and more."""

_WITH_RULE = 2
"""Plans of a short list that has the metric's own and the rule's; of more, the others are those of other metrics."""


@dataclass(frozen=True)
class Planner:
    """Plans of a job for any budget.

    Args:
        context: The run; its store keeps plans: a solver that stops by the clock may find another one the next time.
        table: Scores of every unit in every format of the menu; None where no unit has a choice.
        document: Its JSON form.
        origin: Where it comes from; None where there is no table.
    """

    context: RunContext
    table: SensitivityTable | None
    document: SensitivityDocument | None
    origin: Origin | None = None

    @property
    def job(self) -> Job:
        """The model."""
        return self.context.job

    @property
    def metric(self) -> str:
        """Metric of the configuration."""
        return self.job.settings.metric

    @property
    def scores(self) -> UnitScores:
        """Scores of that metric by unit and format; none where no unit has a choice."""
        return self._scores(self.metric) if self.table else {}

    def _scores(self, metric: str) -> UnitScores:
        assert self.table is not None  # the caller saw that there is a choice
        if metric not in self.table.scores:
            raise InputError(
                f"{self.job.config.sensitivity} has no scores of {metric} (it has {', '.join(self.table.scores)}); "
                "measure again"
            )
        return self.table.scores[metric]

    def _menu(self, budget: int | None) -> Menu:
        """Formats of each unit; of a file what it holds, where nothing is said of group sizes."""
        config, units = self.job.config, self.job.units
        if self.table is None or config.measures or not config.chooses_groups:
            return job_menu(self.job, budget)
        return measured_menu(units, widths(config, units, budget), self.scores)

    def plan(self, budget: int) -> BitPlan:
        """The plan of least predicted loss within a budget."""
        job, menu = self.job, self._menu(budget)
        if self.table is None:
            fixed = single_choice_plan(job.units, menu, job.pins, budget, job.config)
            assert fixed is not None  # otherwise something was measured
            return fixed
        known = self.context.saved.load(f"plan-{budget}")
        if known is not None:
            return plan_of_record(known)
        plan = allocate(job.units, menu, self.scores, job.pins, budget, self.metric, job.config)
        self.context.saved.save(f"plan-{budget}", plan_record(plan))
        return plan

    def curve(self) -> Frontier:
        """The whole frontier of predicted loss."""
        menu = self._menu(None)
        only = {} if self.table else {unit: formats[0] for unit, formats in menu.items()}
        pins = {**only, **self.job.pins}
        return frontier(build_problem(self.job.units, menu, self.scores, pins))

    def predicted(self, plan: BitPlan) -> dict[str, float]:
        """Predicted loss of a plan by metric, for the metrics that have all scores that it needs."""
        tables = self.table.scores if self.table else {}
        sums = {metric: predicted_loss(plan.formats, scores, self.job.pins) for metric, scores in tables.items()}
        return {metric: loss for metric, loss in sums.items() if loss is not None}

    def shortlist(self, budget: int) -> dict[str, BitPlan]:
        """Plans to try at a budget, by name; the configured metric's own comes first, that of the rule last.

        There are as many as the setting says, fewer where they are the same.
        """
        own, job = self.plan(budget), self.job
        if self.table is None:
            return {"uniform menu": own}
        plans, known = {self.metric: own}, (job.units, self._menu(budget), self.table, job.pins, own, budget)
        most = job.settings.shortlist
        if most > _WITH_RULE:
            plans = dict([*plans.items(), *alternatives(*known).items()][: most - 1])
        if most < _WITH_RULE:
            return plans
        rule = rule_plan(*known)
        new = all(rule.formats != plan.formats for plan in plans.values())
        allowed = within_second_budget(job.config, job.units, rule)
        if new and len(set(rule.formats.values())) > 1 and allowed is not None:
            plans[RULE] = allowed
        return plans


def make_planner(context: RunContext, sets: dict[str, Rows]) -> Planner:
    """Measure, or read what was measured, unless no unit has a choice.

    Raises:
        UsageError: If the budget is infeasible, or the file was measured for something else.
    """
    job = context.job
    menu, budget = job_menu(job, None), None
    if job.config.target_kl is None:
        budget = budget_bytes(job.config, job.units, unquantized_bytes(job, menu), job.pins)
        menu = job_menu(job, budget)
    if not _has_choice(job, menu):
        return Planner(context, None, None)
    if job.config.measures:
        if job.config.measurements is not None:
            # The widths of any budget, so that runs that differ in it alone share one measurement.
            menu = job_menu(job, None)
        document, origin = measured(context, menu, sets, _metrics(job))
        return Planner(context, parse_sensitivity(document, "the measurement")[0], document, origin)
    given, table = _saved_scores(job, menu)
    if table.model_fingerprint != model_fingerprint(job.index, context.reporter):
        raise UsageError(
            f"{job.config.sensitivity} was measured on another checkpoint ({table.model}) or with another --rotate; "
            "measure this one"
        )
    seconds = table.settings.get("seconds")
    origin = Origin("file", None, seconds if isinstance(seconds, float) else None)
    return Planner(context, table, given, origin)


def _metrics(job: Job) -> tuple[str, ...]:
    """Metrics that are measured: all, or the one that chooses where no plans of others are compared, now or later.

    Beside it each takes a product of every layer's errors with the moments of its inputs, or with its gradients.
    """
    alone = job.settings.shortlist <= _WITH_RULE and job.config.measurements is None
    return (job.settings.metric,) if alone and job.settings.metric in SWEEP_METRICS else SWEEP_METRICS


def check_saved_scores(job: Job, menu: Menu) -> None:
    """Refuse a file of scores that cannot be used before the work, as far as that shows without reading the weights.

    Raises:
        InputError: If it is damaged, or no file of scores.
        UsageError: If it was measured for something else.
    """
    if not job.config.measures and _has_choice(job, menu):
        _saved_scores(job, menu)


def _saved_scores(job: Job, menu: Menu) -> tuple[SensitivityDocument, SensitivityTable]:
    """Scores of the file that ``sensitivity`` names; whether it is of these weights remains to be checked."""
    path = Path(job.config.sensitivity)
    given = cast(SensitivityDocument, read_json(path, SENSITIVITY_SCHEMA))
    table, _, _ = parse_sensitivity(given, str(path))
    _check_saved(job, table)
    _check_units(job, table, menu)
    return given, table


def _has_choice(job: Job, menu: Menu) -> bool:
    return any(len(menu[unit.name]) > 1 and unit.name not in job.pins for unit in job.units)


def _check_saved(job: Job, table: SensitivityTable) -> None:
    config = job.config
    if table.rounding != config.rounding:
        raise UsageError(
            f"{config.sensitivity} was measured for --rounding {table.rounding}, not {config.rounding}; measure again"
        )
    if table.symmetric != config.symmetric:
        kind, flag = ("symmetric", "--symmetric") if table.symmetric else ("asymmetric", "--asymmetric")
        raise UsageError(f"{config.sensitivity} was measured for {kind} grids; give {flag} or measure again")


def _check_units(job: Job, table: SensitivityTable, menu: Menu) -> None:
    scored = {unit for scores in table.scores.values() for unit in scores}
    open_ = (name for name, formats in menu.items() if len(formats) > 1 and name not in job.pins)
    missing = next((name for name in open_ if name not in scored), None)
    if missing is not None:
        raise UsageError(
            f"{job.config.sensitivity} has no scores of {missing}; expected those of the units of this run, found "
            f"those of another checkpoint ({table.model}), or of another --profile, --ignore or --quantize-lm-head, "
            "which make the units; measure again"
        )


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
    calibrated = next((name for name, fmt in plan.formats.items() if fmt.has_input_divisor), None)
    if calibrated is not None and config.rounds_without_rows:
        raise UsageError(
            f"{config.plan}: {calibrated} is {plan.formats[calibrated].label}, whose scales of inputs are found on "
            "rows, and none are read; give --calibration"
        )
    return plan


def allocate(
    units: Sequence[Unit],
    menu: Menu,
    scores: UnitScores,
    pins: UnitFormats,
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
    second = second_budget(config, units, menu, pins)
    large = second is None and len(problem.choices) > EXACT_UNITS
    if config.solver == "hull" or (config.solver == "auto" and large):
        return solve(problem, budget, metric)
    from hawqtool.allocation.exact import solve as solve_exactly

    return solve_exactly(problem, budget, metric, second=second)


def single_choice_plan(
    units: Sequence[Unit],
    menu: Menu,
    pins: UnitFormats,
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
    second = second_budget(config, units, menu, fixed)
    return plan if second is None else replace(plan, cost=second.total(fixed), max_cost=second.limit)
