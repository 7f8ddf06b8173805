"""Improve a plan by measured exchanges: every unit one width up or down, at the plan itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem
from hawqtool.formats import QuantFormat
from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.model.sweep import ModelStream
from hawqtool.pipeline.artifacts import plan_of_record, plan_record
from hawqtool.pipeline.candidates import Candidate, Stopwatch, Workbench, formats_key
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.measuring import job_menu
from hawqtool.pipeline.progress import Reporter
from hawqtool.records import BitPlan, Rows, Score
from hawqtool.sensitivity.exchange import exchange_divergence

Menu = dict[str, tuple[QuantFormat, ...]]


def exchanged(bench: Workbench, candidate: Candidate, budget: int) -> BitPlan:
    """The plan that exchanges at a candidate give, measured on the scoring rows; its own where there is no choice."""
    job, present = bench.job, candidate.plan.formats
    menu = neighbouring(job_menu(job, budget), present, set(job.pins))
    if all(len(formats) == 1 for formats in menu.values()):
        return candidate.plan
    rows = bench.sets["calibration"], bench.sets["scoring"].tokens
    saved = bench.saved.part(f"exchange-{formats_key(present)}")
    known = saved.load("plan")
    if known is not None:
        return plan_of_record(known)
    with Stopwatch(bench.timings, "exchange"):
        quantized = job.packed_stream(bench.folder(candidate))
        plan = exchange(job, quantized, present, menu, *rows, budget, bench.reporter, saved)
    saved.save("plan", plan_record(plan))
    return plan


def exchange(
    job: Job,
    quantized: ModelStream,
    present: Mapping[str, QuantFormat],
    menu: Menu,
    calibration: Rows,
    scoring: Tensor,
    budget: int,
    reporter: Reporter,
    saved: Saved = NOTHING_SAVED,
) -> BitPlan:
    """The plan of least predicted divergence that takes one format of a small menu per unit.

    Scores are measured differences at the present plan (`hawqtool.sensitivity.exchange`). That several exchanges at
    once add up is an assumption, which rounding and evaluating the new plan then tests.

    Args:
        job: The original model.
        quantized: The model under the present plan.
        present: Formats of that plan by unit.
        menu: Formats to choose from, the present one among them (see `neighbouring`).
        calibration: Rows behind the rounding.
        scoring: Rows to measure on.
        budget: Most stored bytes.
        reporter: Progress.
        saved: Keeps the scores, block by block.
    """
    others = {unit: tuple(fmt for fmt in formats if fmt != present[unit]) for unit, formats in menu.items()}
    scores = exchange_divergence(
        job.stream(),
        quantized,
        calibration,
        scoring,
        {unit: formats for unit, formats in others.items() if formats},
        job.method,
        job.stored_dtypes,
        job.rows_per_slice,
        reporter.progress,
        saved,
    )
    for unit, fmt in present.items():
        scores.setdefault(unit, {})[fmt.label] = Score(0.0, 0.0)
    # What was not measured (an output head) keeps its format.
    measured = {
        unit: tuple(fmt for fmt in formats if fmt.label in scores[unit]) or (present[unit],)
        for unit, formats in menu.items()
    }
    return solve(build_problem(job.units, measured, scores, job.pins), budget, "exchange")


def neighbouring(
    menu: Mapping[str, tuple[QuantFormat, ...]], present: Mapping[str, QuantFormat], pinned: set[str]
) -> Menu:
    """The present format of each unit and its neighbours in the menu by size; pinned units keep theirs."""
    found: Menu = {}
    for unit, formats in menu.items():
        # Larger groups are smaller formats, whole rows the smallest: group sizes cost less than a bit.
        ordered = sorted(formats, key=lambda fmt: (fmt.bits, -(fmt.group_size or math.inf)))
        if unit in pinned or present[unit] not in ordered:
            found[unit] = (present[unit],)
            continue
        place = ordered.index(present[unit])
        found[unit] = tuple(ordered[max(0, place - 1) : place + 2])
    return found
