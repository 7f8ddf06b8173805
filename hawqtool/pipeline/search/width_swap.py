"""Improve a plan by measured swaps: every unit one width up or down, at the plan itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import plan_of_record, plan_record
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.pipeline.search.trials import Trial, TrialRunner, formats_key
from hawqtool.records import BitPlan, MeasurementRows, Menu, Rows, Score, UnitFormats, UnitScores
from hawqtool.runtime.stage_timer import Stopwatch
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.measure import Progress
from hawqtool.sensitivity.measured_kl import pairs_of_scores, scores_of_pairs
from hawqtool.sensitivity.shrinkage import updated
from hawqtool.sensitivity.width_swap import swap_divergence
from hawqtool.streaming.stream import ModelStream

_FOUND = "found"


def swapped(runner: TrialRunner, trial: Trial, budget: int, expected: UnitScores) -> tuple[BitPlan, UnitScores]:
    """What `swap_widths` gives at a trial, measured on the scoring rows; its own plan where there is no choice."""
    job, present = runner.context.job, trial.plan.formats
    menu = neighbouring(job_menu(job, budget), present, set(job.pins))
    if all(len(formats) == 1 for formats in menu.values()):
        return trial.plan, expected
    context = runner.context.part(f"width-swap-{formats_key(present)}")
    known = context.saved.load(_FOUND)
    if known is not None:
        return plan_of_record(known["plan"]), scores_of_pairs(known["scores"])
    with Stopwatch(runner.timings, "width swap"):
        plan, scores = swap_widths(context, runner.folder(trial), present, menu, runner.sets, budget, expected)
    context.saved.save(_FOUND, {"plan": plan_record(plan), "scores": pairs_of_scores(scores)})
    return plan, scores


def swap_widths(
    context: RunContext,
    quantized: Path | ModelStream,
    present: UnitFormats,
    menu: Menu,
    sets: Mapping[str, Rows],
    budget: int,
    expected: UnitScores,
) -> tuple[BitPlan, UnitScores]:
    """The plan of least predicted divergence that takes one format of a small menu per unit.

    Scores are measured differences at the present plan (`hawqtool.sensitivity.width_swap`), as far as they are certain
    (`hawqtool.sensitivity.shrinkage`). That several swaps at once add up is an assumption, which rounding and
    evaluating the new plan then tests.

    Args:
        context: The run of the original model; its store keeps the scores, block by block.
        quantized: The model under the present plan: its written folder, whose measuring ranks share, or its stream.
        present: Formats of that plan by unit.
        menu: Formats to choose from, the present one among them (see `neighbouring`).
        sets: The calibration rows, which are behind the rounding, and the scoring rows, which are measured on.
        budget: Most stored bytes.
        expected: Scores by unit and format that are known so far.

    Returns:
        The plan, and the scores that led to it, to be expected by the next swap.
    """
    job = context.job
    others = {unit: tuple(fmt for fmt in formats if fmt != present[unit]) for unit, formats in menu.items()}
    menu_of_others = {unit: formats for unit, formats in others.items() if formats}
    asked = quantized, menu_of_others, sets["calibration"], sets["scoring"].tokens
    sharing = context.shared(_measured, *asked) if isinstance(quantized, Path) else job
    measured = _measured(sharing, *asked, context.reporter.progress, context.saved)
    labels = {unit: fmt.label for unit, fmt in present.items()}
    scores, trust = updated(expected, measured, labels)
    context.reporter.say(
        f"measured changes are {trust.scale:.2f} times what was expected, give or take {trust.share:.0%} of the scores"
    )
    changes = relative_scores(scores, measured, labels)
    # What was not measured (an output head) keeps its format.
    choice = {
        unit: tuple(fmt for fmt in formats if fmt.label in changes[unit]) or (present[unit],)
        for unit, formats in menu.items()
    }
    return solve(build_problem(job.units, choice, changes, job.pins), budget, "width swap"), scores


def _measured(
    job: Job,
    quantized: Path | ModelStream,
    menu: Menu,
    calibration: Rows,
    scoring: Tensor,
    progress: Progress = lambda *_: None,
    saved: Saved = NOTHING_SAVED,
) -> UnitScores:
    """What each swap changes, on this rank's share of the rows."""
    return swap_divergence(
        job.stream(),
        job.packed_stream(quantized) if isinstance(quantized, Path) else quantized,
        MeasurementRows(calibration, scoring, job.settings.batch_size),
        job.rounding(menu),
        progress,
        saved,
        job.ranks,
    )


def relative_scores(scores: UnitScores, measured: UnitScores, present: Mapping[str, str]) -> UnitScores:
    """Scores of what was measured less those of the present formats, and these with 0."""
    changes = {unit: {label: Score(0.0, 0.0)} for unit, label in present.items()}
    for unit, found in measured.items():
        base = scores[unit][present[unit]].value
        changes[unit] |= {label: Score(scores[unit][label].value - base, scores[unit][label].stderr) for label in found}
    return changes


def neighbouring(menu: Menu, present: UnitFormats, pinned: set[str], reach: int = 1) -> Menu:
    """The present format of each unit and its neighbours in the menu by size; pinned units keep theirs.

    With a reach beyond 1, so many places to either side, and the widths next to the present one at its group size.
    """
    found: dict[str, Sequence[QuantFormat]] = {}
    for unit, formats in menu.items():
        # Larger groups are smaller formats, whole rows the smallest: group sizes cost less than a bit.
        ordered = sorted(formats, key=lambda fmt: (fmt.bits, -(fmt.group_size or math.inf)))
        if unit in pinned or present[unit] not in ordered:
            found[unit] = (present[unit],)
            continue
        place = ordered.index(present[unit])
        near, own = ordered[max(0, place - reach) : place + reach + 1], present[unit]
        alike = sorted({fmt.bits for fmt in ordered if fmt.group_size == own.group_size})
        beside = set(alike[max(0, alike.index(own.bits) - 1) : alike.index(own.bits) + 2]) if reach > 1 else set()
        found[unit] = tuple(
            fmt for fmt in ordered if fmt in near or (fmt.bits in beside and fmt.group_size == own.group_size)
        )
    return found
