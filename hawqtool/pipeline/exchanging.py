"""Improve a plan by measured exchanges: every unit one width up or down, at the plan itself."""

from __future__ import annotations

import time

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.candidates import Candidate, Workbench
from hawqtool.pipeline.measuring import job_menu
from hawqtool.records import BitPlan, Score
from hawqtool.sensitivity.exchange import exchange_divergence

Menu = dict[str, tuple[QuantFormat, ...]]


def exchanged(bench: Workbench, candidate: Candidate, budget: int) -> BitPlan:
    """The plan of least predicted divergence among those that differ from a candidate by one width per unit.

    Scores are measured differences (`hawqtool.sensitivity.exchange`) on the scoring rows; that several exchanges at
    once add up is an assumption, which rounding and evaluating the new plan then tests.
    """
    start = time.perf_counter()
    job, present = bench.job, candidate.plan.formats
    menu = _neighbours(job_menu(job, budget), present, set(job.pins))
    others = {unit: tuple(fmt for fmt in formats if fmt != present[unit]) for unit, formats in menu.items()}
    scores = exchange_divergence(
        job.stream(),
        job.packed_stream(candidate.folder),
        bench.sets["calibration"].tokens,
        bench.sets["scoring"].tokens,
        {unit: formats for unit, formats in others.items() if formats},
        job.method,
        job.stored_dtypes,
        job.rows_per_slice,
        bench.reporter.progress,
    )
    for unit, fmt in present.items():
        scores.setdefault(unit, {})[fmt.label] = Score(0.0, 0.0)
    bench.timings["exchange"] = bench.timings.get("exchange", 0.0) + time.perf_counter() - start
    reachable = {
        unit: tuple(fmt for fmt in formats if fmt.label in scores[unit]) or (present[unit],)
        for unit, formats in menu.items()
    }
    return solve(build_problem(job.units, reachable, scores, job.pins), budget, "exchange")


def _neighbours(menu: Menu, present: dict[str, QuantFormat], pinned: set[str]) -> Menu:
    """The present format of each unit and its neighbours in the menu by width; pinned units keep theirs."""
    found: Menu = {}
    for unit, formats in menu.items():
        ordered = sorted(formats)
        if unit in pinned or present[unit] not in ordered:
            found[unit] = (present[unit],)
            continue
        place = ordered.index(present[unit])
        found[unit] = tuple(ordered[max(0, place - 1) : place + 2])
    return found
