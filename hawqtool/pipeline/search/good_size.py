"""The size at which a result would be good, as the frontier of predicted loss knows it."""

from __future__ import annotations

import math

from hawqtool.allocation.frontier import frontier
from hawqtool.allocation.problem import build_problem
from hawqtool.formats import parse_label
from hawqtool.pipeline.run.menu import unquantized_bytes
from hawqtool.pipeline.search.planner import Planner
from hawqtool.records import BitPlan
from hawqtool.report.schema import GoodSize, Verdict
from hawqtool.report.verdict import next_bound


def good_size(planner: Planner | None, plan: BitPlan, divergence: float, found: Verdict) -> GoodSize | None:
    """The smallest plan that is predicted to reach the next better grade.

    Predictions are scaled so that they give what was measured at the shipped plan: scores order plans better than they
    tell their divergence.

    Args:
        planner: Scores of all units; None where there are none.
        plan: The shipped plan.
        divergence: What was measured of it on the report rows.
        found: The verdict on it.

    Returns:
        None where nothing was scored, no plan of the measured formats is good enough, or the result is.
    """
    aim = next_bound(found)
    if planner is None or not planner.scores or aim is None:
        return None
    predicted = planner.predicted(plan).get(planner.metric)
    if predicted is None or not predicted > 0 or not math.isfinite(divergence) or divergence <= 0:
        return None
    job, scores = planner.job, planner.scores
    menu = {unit: tuple(parse_label(label) for label in by_label) for unit, by_label in scores.items()}
    if not menu.keys() >= {unit.name for unit in job.units if unit.name not in job.pins}:
        return None
    menu |= {unit: (fmt,) for unit, fmt in job.pins.items()}
    problem = build_problem(job.units, menu, scores, job.pins)
    for stored, loss in frontier(problem).points:
        if loss * divergence / predicted <= aim[1] and stored > plan.stored_bytes:
            total = stored + unquantized_bytes(job, menu)
            return {"grade": aim[0], "bpw_linears": problem.bpw(stored), "bytes": total}
    return None
