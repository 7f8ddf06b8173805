"""A quality target: the smallest plan whose measured divergence meets it."""

from __future__ import annotations

from hawqtool.allocation.quality_target import Attempt, smallest_meeting
from hawqtool.pipeline.search.planner import Planner
from hawqtool.pipeline.search.selection import worst_divergence
from hawqtool.pipeline.search.trials import Trial, TrialRunner
from hawqtool.records import BitPlan
from hawqtool.report.schema import Search, SearchTrial


def find_smallest(runner: TrialRunner, planner: Planner, bound: float) -> tuple[Search, dict[str, BitPlan]]:
    """Search the frontier with real roundings and evaluations.

    A plan meets the bound when its divergence does on the selection rows and on the report rows, so that the figure
    in the report is within it too.

    Returns:
        What was tried (for the report), and the plan by name: the smallest that meets the bound, or the best of all
        where none does.
    """
    tried: dict[Attempt, Trial] = {}

    def measure(budget: int) -> Attempt:
        plan = planner.plan(budget)
        trial = runner.run_trial(f"plan of {plan.bpw:.3f} bits", plan)
        found = Attempt(plan.stored_bytes, worst_divergence(trial))
        tried[found] = trial
        best = min((a for a in tried if a.measured <= bound), key=lambda a: a.stored_bytes, default=None)
        runner.keep_only([tried[best or min(tried, key=lambda a: a.measured)]])
        return found

    found = smallest_meeting(planner.curve().points, measure, bound)
    chosen = found.met or min(found.attempts, key=lambda attempt: attempt.measured)
    missed = found.missed if found.met else None
    record: Search = {
        "bound": bound,
        "met": found.met is not None,
        "largest_that_misses": None if missed is None else _entry(missed, tried[missed]),
        "trials": [_entry(attempt, tried[attempt]) for attempt in found.attempts],
    }
    return record, {planner.metric if planner.table else "uniform menu": tried[chosen].plan}


def _entry(attempt: Attempt, trial: Trial) -> SearchTrial:
    return {
        "stored_bytes": attempt.stored_bytes,
        "bpw_linears": trial.plan.bpw,
        "divergence": {role: evaluation.divergence for role, evaluation in trial.quality.items()},
    }
