"""Which plans a run tries: from scores that were measured or read once, for any budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqtool.allocation.frontier import Frontier, frontier
from hawqtool.allocation.problem import build_problem
from hawqtool.errors import InputError, UsageError
from hawqtool.model.index import fingerprint
from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.pipeline.artifacts import SENSITIVITY_SCHEMA, parse_sensitivity, plan_of_record, plan_record, read_json
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.measuring import Origin, job_menu, measured, unquantized_bytes
from hawqtool.pipeline.planning import allocate, budget_bytes, predicted_loss, single_choice_plan
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.shortlist import rivals
from hawqtool.records import BitPlan, Rows, Score, SensitivityTable


@dataclass(frozen=True)
class Allocator:
    """Plans of a job for any budget.

    Args:
        job: The model.
        table: Scores of every unit in every format of the menu; None where no unit has a choice.
        document: Its JSON form.
        origin: Where it comes from; None where there is no table.
        saved: Keeps plans: a solver that stops by the clock may find another one the next time.
    """

    job: Job
    table: SensitivityTable | None
    document: dict[str, Any] | None
    origin: Origin | None = None
    saved: Saved = NOTHING_SAVED

    @property
    def metric(self) -> str:
        """Metric of the configuration."""
        return self.job.config.metric

    @property
    def scores(self) -> dict[str, dict[str, Score]]:
        """Scores of that metric by unit and format; none where no unit has a choice."""
        return self._scores(self.metric) if self.table else {}

    def _scores(self, metric: str) -> dict[str, dict[str, Score]]:
        assert self.table is not None  # the caller saw that there is a choice
        if metric not in self.table.scores:
            raise InputError(
                f"{self.job.config.sensitivity} has no scores of {metric} (it has {', '.join(self.table.scores)}); "
                "measure again"
            )
        return self.table.scores[metric]

    def plan(self, budget: int) -> BitPlan:
        """The plan of least predicted loss within a budget."""
        job, menu = self.job, job_menu(self.job, budget)
        if self.table is None:
            fixed = single_choice_plan(job.units, menu, job.pins, budget, job.config)
            assert fixed is not None  # otherwise something was measured
            return fixed
        known = self.saved.load(f"plan-{budget}")
        if known is not None:
            return plan_of_record(known)
        plan = allocate(job.units, menu, self.scores, job.pins, budget, self.metric, job.config)
        self.saved.save(f"plan-{budget}", plan_record(plan))
        return plan

    def curve(self) -> Frontier:
        """The whole frontier of predicted loss."""
        menu = job_menu(self.job, None)
        pins = self.job.pins if self.table else {unit: formats[0] for unit, formats in menu.items()} | self.job.pins
        return frontier(build_problem(self.job.units, menu, self.scores, pins))

    def predicted(self, plan: BitPlan) -> dict[str, float]:
        """Predicted loss of a plan by metric, for the metrics that have all scores that it needs."""
        tables = self.table.scores if self.table else {}
        sums = {metric: predicted_loss(plan.formats, scores, self.job.pins) for metric, scores in tables.items()}
        return {metric: loss for metric, loss in sums.items() if loss is not None}

    def shortlist(self, budget: int) -> dict[str, BitPlan]:
        """Plans to try at a budget, by name; the configured metric's own comes first."""
        own = self.plan(budget)
        if self.table is None:
            return {"uniform menu": own}
        job = self.job
        others = rivals(job.units, job_menu(job, budget), self.table, job.pins, own, budget)
        return dict([(self.metric, own), *others.items()][: job.shortlist])


def prepare_allocation(job: Job, sets: dict[str, Rows], reporter: Reporter, saved: Saved = NOTHING_SAVED) -> Allocator:
    """Measure, or read what was measured, unless no unit has a choice.

    Raises:
        UsageError: If the budget is infeasible, or the file was measured for something else.
    """
    menu, budget = job_menu(job, None), None
    if job.config.target_kl is None:
        budget = budget_bytes(job.config, job.units, unquantized_bytes(job, menu))
        menu = job_menu(job, budget)
    if all(len(menu[unit.name]) == 1 or unit.name in job.pins for unit in job.units):
        return Allocator(job, None, None)
    if job.config.measures:
        if job.config.measurements is not None:
            # The widths of any budget, so that runs that differ in it alone share one measurement.
            menu = job_menu(job, None)
        document, origin = measured(job, menu, sets, reporter, saved)
        return Allocator(job, parse_sensitivity(document, "the measurement")[0], document, origin, saved)
    path = Path(job.config.sensitivity)
    document = read_json(path, SENSITIVITY_SCHEMA)
    table, _, _ = parse_sensitivity(document, str(path))
    _check_saved(job, table)
    seconds = table.settings.get("seconds")
    origin = Origin("file", None, seconds if isinstance(seconds, float) else None)
    return Allocator(job, table, document, origin, saved)


def _check_saved(job: Job, table: SensitivityTable) -> None:
    config = job.config
    if table.model_fingerprint != fingerprint(job.index):
        raise UsageError(f"{config.sensitivity} was measured on another checkpoint ({table.model}); measure this one")
    if table.rounding != config.rounding:
        raise UsageError(
            f"{config.sensitivity} was measured for --rounding {table.rounding}, not {config.rounding}; measure again"
        )
    if table.symmetric != config.symmetric:
        kind, flag = ("symmetric", "--symmetric") if table.symmetric else ("asymmetric", "--asymmetric")
        raise UsageError(f"{config.sensitivity} was measured for {kind} grids; give {flag} or measure again")
