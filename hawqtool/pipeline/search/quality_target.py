"""A quality target: the smallest plan whose measured divergence meets it."""

from __future__ import annotations

from hawqtool.allocation.quality_target import MeasuredPlan, smallest_meeting
from hawqtool.pipeline.search.planner import Planner
from hawqtool.pipeline.search.trials import Trial, TrialRunner
from hawqtool.records import BitPlan
from hawqtool.report.schema import Search, SearchTrial


def find_smallest(runner: TrialRunner, planner: Planner, bound: float) -> tuple[Search, dict[str, BitPlan]]:
    """Search the frontier with real roundings and evaluations.

    A plan meets the bound when its divergence does on the selection rows. The report rows choose nothing, so that the
    figure of the report may lie a little above the bound, by chance, as it may lie below.

    Returns:
        What was tried (for the report), and the plan by name: the smallest that meets the bound, or the best of all
        where none does.
    """
    tried: dict[MeasuredPlan, Trial] = {}

    def measure(budget: int) -> MeasuredPlan:
        plan = planner.plan(budget)
        trial = runner.run_trial(f"plan of {plan.bpw:.3f} bits", plan)
        found = MeasuredPlan(plan.stored_bytes, trial.selection)
        tried[found] = trial
        best = min((a for a in tried if a.measured <= bound), key=lambda a: a.stored_bytes, default=None)
        runner.keep_only([tried[best or min(tried, key=lambda a: a.measured)]])
        return found

    found = smallest_meeting(planner.curve().points, measure, bound)
    chosen = found.met or min(found.measured_plans, key=lambda measured_plan: measured_plan.measured)
    missed = found.missed if found.met else None
    record: Search = {
        "bound": bound,
        "met": found.met is not None,
        "largest_that_misses": None if missed is None else _entry(missed, tried[missed]),
        "trials": [_entry(measured_plan, tried[measured_plan]) for measured_plan in found.measured_plans],
    }
    return record, {planner.metric if planner.table else "uniform menu": tried[chosen].plan}


def _entry(measured_plan: MeasuredPlan, trial: Trial) -> SearchTrial:
    return {
        "stored_bytes": measured_plan.stored_bytes,
        "bpw_linears": trial.plan.bpw,
        "divergence": {role: evaluation.divergence for role, evaluation in trial.quality.items()},
    }
