"""Improve a plan by gradients at the quantized model: many moves at a time, taken where the real divergence falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hawqtool.allocation.exact import SecondCost
from hawqtool.allocation.exact import solve as solve_exactly
from hawqtool.allocation.problem import build_problem, stored_bytes
from hawqtool.evaluation.divergence import OutputComparison, standard_error
from hawqtool.evaluation.paired import paired_rows
from hawqtool.formats import QuantFormat, parse_label
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import plan_of_record, plan_record
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.pipeline.search.trials import Trial, TrialRunner, formats_key
from hawqtool.pipeline.search.width_swap import neighbouring, relative_scores
from hawqtool.pipeline.stages.measure import rows_of_measurement
from hawqtool.records import BitPlan, Menu, Score, UnitFormats, UnitScores
from hawqtool.report.plan_comparison import SwapAttempt
from hawqtool.runtime.stage_timer import Stopwatch
from hawqtool.sensitivity.measured_kl import pairs_of_scores, scores_of_pairs
from hawqtool.sensitivity.plan_gradient import PlanChanges, Reference, plan_changes, round_formats
from hawqtool.sensitivity.shrinkage import updated
from hawqtool.streaming.spliced import RoundingStore, SplicedModel

METRIC = "gradient swap"
"""Name of the scores behind a plan that this module gives."""

REACH = 2
"""Places in the order of sizes, up and down, that a unit's formats may be from its first one."""

FIRST_SHARE, SHARES = 0.1, (1.0, 0.5, 0.25)
"""Share of the stored bytes that may move at first, and the parts of the share that are tried with one gradient."""

REFUSALS = 2
"""Shares of one gradient after whose refusal the search ends."""

ROW_LENGTH = 512
"""Tokens to which longer rows are cut for the gradients: noise falls with the rows, not with their tokens."""

CAUTIONS = (1.0, 0.0)
"""Standard errors that are added to each move's change; the second where nothing looks worthwhile with the first."""

_FOUND, _STATE = "found", "state"


@dataclass(frozen=True)
class Standing:
    """Where a search stands.

    Args:
        formats: The present plan's.
        share: Share of the stored bytes that may move.
        ended: Whether all that the last gradient promised was refused, or it promised nothing.
        rounds: Gradients that were taken.
        attempts: Plans that were tried, in order.
        expected: Scores known so far.
    """

    formats: UnitFormats
    share: float
    ended: bool
    rounds: int
    attempts: tuple[SwapAttempt, ...]
    expected: UnitScores

    def record(self) -> dict[str, Any]:
        """JSON form."""
        labels = {unit: fmt.label for unit, fmt in self.formats.items()}
        return {**vars(self), "formats": labels, "expected": pairs_of_scores(self.expected)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Standing:
        """Inverse of `record`."""
        formats = {unit: parse_label(label) for unit, label in record["formats"].items()}
        expected, attempts = scores_of_pairs(record["expected"]), tuple(record["attempts"])
        return cls(**{**record, "formats": formats, "expected": expected, "attempts": attempts})


def moved_by_gradient(
    runner: TrialRunner, trial: Trial, budget: int, expected: UnitScores
) -> tuple[BitPlan, list[SwapAttempt]]:
    """The plan that rounds of moves at a trial lead to, its own where none is taken, and the plans that were tried.

    Every unit is rounded once in all formats that it may take. A round takes the gradient at the present plan, solves
    for the best moves of a bounded share of the bytes, and judges them by the divergence of the model put together of
    those roundings, on the selection rows, which gave no gradient.

    Args:
        runner: Its sets hold calibration, scoring and selection rows.
        trial: The plan to begin with.
        budget: Most stored bytes.
        expected: Scores by unit and format that are known so far.
    """
    job, present = runner.context.job, trial.plan.formats
    menu = neighbouring(job_menu(job, budget), present, set(job.pins), REACH)
    if all(len(formats) == 1 for formats in menu.values()):
        return trial.plan, []
    context = runner.context.part(f"gradient-swap-{formats_key(present)}")
    known = context.saved.load(_FOUND)
    if known is not None:
        return plan_of_record(known["plan"]), known["attempts"]
    with Stopwatch(runner.timings, "width swap"):
        begun = context.saved.load(_STATE)
        standing = (
            Standing(present, FIRST_SHARE, False, 0, (), expected) if begun is None else Standing.of_record(begun)
        )
        search = _Search(runner, trial, menu, budget)
        while standing.rounds < job.settings.swaps and not standing.ended:
            standing = search.round(standing)
            context.saved.save(_STATE, standing.record())
    plan = _plan(trial.plan, runner.context, standing.formats)
    attempts = list(standing.attempts)
    context.saved.save(_FOUND, {"plan": plan_record(plan), "attempts": attempts})
    return plan, attempts


def _plan(first: BitPlan, context: RunContext, formats: UnitFormats) -> BitPlan:
    """A plan of such formats, or the first one where these are its."""
    if formats == first.formats:
        return first
    stored = stored_bytes(context.job.units, formats)
    return replace(first, formats=formats, stored_bytes=stored, metric=METRIC, predicted_loss=None, lower_bound=None)


class _Search:
    """Rounds of moves from one trial.

    Args:
        runner: Rows, and what the original gives on the selection rows.
        trial: The plan to begin with, whose written folder gives the inputs that layers are rounded on.
        menu: Formats by unit, the trial's own among them.
        budget: Most stored bytes.
    """

    def __init__(self, runner: TrialRunner, trial: Trial, menu: Menu, budget: int) -> None:
        assert runner.evaluator is not None  # without an evaluation there are no swaps
        self.context, self.menu, self.budget = runner.context, menu, budget
        job, sets, evaluator = self.context.job, runner.sets, runner.evaluator
        scoring = _cut(sets["scoring"].tokens) if job.task.generates else sets["scoring"].tokens
        self.rows = rows_of_measurement(job, sets["calibration"], scoring)
        original, folder = job.stream(), runner.folder(trial)
        states = original.final_hidden(self.rows.scoring, self.rows.batch_size, lambda _: None)
        self.reference = Reference(original, self.rows.scoring, states)
        self.store: RoundingStore = round_formats(
            original,
            job.packed_stream(folder),
            self.rows,
            job.rounding(menu),
            job.offload,
            self.context.reporter.progress,
        )
        # Norms that learning changed go with the codes that it changed.
        self.stream = job.stream() if job.config.learns else job.packed_stream(folder)
        self.selection, known = sets["selection"], evaluator.reference["selection"]
        if self.context.ranks.size > 1:  # the leader has judged a share of the rows; swaps are all its own
            known = original.final_hidden(self.selection.tokens, self.rows.batch_size, lambda _: None)
        self.comparison = OutputComparison(evaluator.stream, self.stream, self.selection.tokens, known)

    def spliced(self, formats: UnitFormats) -> SplicedModel:
        """The model of such formats."""
        return SplicedModel(self.stream, self.store, formats)

    def divergence(self, formats: UnitFormats) -> Tensor:
        """Divergence of every selection row, ``[rows]`` float64."""
        with self.stream.keeping_pages():
            states = self.spliced(formats).final_hidden(self.selection.tokens, self.rows.batch_size)
            return self.comparison.divergence(states)

    def round(self, standing: Standing) -> Standing:
        """One gradient, and moves by it until some are taken or all that it promises are refused."""
        job, present = self.context.job, standing.formats
        changes = plan_changes(
            self.reference,
            self.spliced(present),
            self.rows.scoring_batch,
            self.menu,
            job.config.seed,
            self.context.reporter.progress,
        )
        labels = {unit: fmt.label for unit, fmt in present.items()}
        measured = changes.scores()
        scores, trust = updated(standing.expected, measured, labels)
        self.context.reporter.say(
            f"changes by gradient are {trust.scale:.2f} times what was expected, give or take {trust.share:.0%} of the "
            "scores"
        )
        relative = relative_scores(scores, measured, labels)
        standing, share = replace(standing, rounds=standing.rounds + 1), standing.share
        before, tried = self.divergence(present), [dict(present)]
        plans = self.candidates(present, relative, share, tried)
        while not plans and share < 1:  # units so large that none can move
            share = min(1.0, 2 * share)
            plans = self.candidates(present, relative, share, tried)
        for _ in range(REFUSALS):
            tried += plans
            found = [
                self.attempt(replace(standing, share=share), changes, relative, before, p, len(plans)) for p in plans
            ]
            standing = replace(standing, attempts=(*standing.attempts, *found))
            better = [index for index, attempt in enumerate(found) if attempt["accepted"]]
            if better:
                best = min(better, key=lambda index: found[index]["measured"])
                for index in better:
                    found[index]["accepted"] = index == best
                return replace(standing, formats=plans[best], share=next_share(share, found[best]), expected=scores)
            share *= SHARES[-1] / 2
            plans = self.candidates(present, relative, share, tried)
        return replace(standing, share=share, ended=True)

    def candidates(
        self, present: UnitFormats, relative: UnitScores, share: float, tried: Sequence[UnitFormats]
    ) -> list[dict[str, QuantFormat]]:
        """Plans of least predicted divergence that move parts of a share of the bytes; none that was tried before.

        What is promised beyond the standard errors of the moves goes first; where that is nothing, what is promised.
        """
        plans = (self._within(present, relative, share, tried, caution) for caution in CAUTIONS)
        return next((found for found in plans if found), [])

    def _within(
        self, present: UnitFormats, relative: UnitScores, share: float, tried: Sequence[UnitFormats], caution: float
    ) -> list[dict[str, QuantFormat]]:
        units = self.context.job.units
        formats = {
            unit: tuple(fmt for fmt in found if fmt == present[unit] or fmt.label in relative.get(unit, {}))
            for unit, found in self.menu.items()
        }
        cautious = {
            unit: {label: Score(s.value + caution * _finite(s.stderr), s.stderr) for label, s in found.items()}
            for unit, found in relative.items()
        }
        problem = build_problem(units, formats, cautious, self.context.job.pins)
        sizes = {u.name: {fmt: u.stored_bytes(fmt) for fmt in (present[u.name], *formats[u.name])} for u in units}
        moved = {u: {fmt: abs(size - by[present[u]]) for fmt, size in by.items()} for u, by in sizes.items()}
        total, found = stored_bytes(units, present), list[dict[str, QuantFormat]]()
        for part in SHARES:
            plan = solve_exactly(problem, self.budget, second=SecondCost(moved, part * share * total))
            chosen = dict(plan.formats)
            if (plan.predicted_loss or 0.0) < 0 and chosen not in found and chosen not in tried:
                found.append(chosen)
        return found

    def attempt(
        self,
        standing: Standing,
        changes: PlanChanges,
        relative: UnitScores,
        before: Tensor,
        plan: UnitFormats,
        count: int,
    ) -> SwapAttempt:
        """What was predicted of a plan, and what its real divergence is; ``count`` plans are tried together."""
        moves = {unit: fmt.label for unit, fmt in plan.items() if fmt != standing.formats[unit]}
        difference = paired_rows(self.divergence(plan) - before, self.selection.sources)
        found: SwapAttempt = {
            "round": standing.rounds,
            "share": standing.share,
            "moves": len(moves),
            "stored_bytes": stored_bytes(self.context.job.units, plan),
            "predicted": math.fsum(relative[unit][label].value for unit, label in moves.items()),
            "predicted_stderr": standard_error(changes.together(moves)),
            "measured": difference.value,
            "measured_stderr": difference.stderr,
            "accepted": difference.is_less(count),
        }
        self.context.reporter.say(
            f"swaps, round {standing.rounds}: {len(moves)} moves, predicted {found['predicted']:+.4f}, measured "
            f"{found['measured']:+.4f} give or take {difference.stderr:.4f}"
        )
        return found


def next_share(share: float, attempt: SwapAttempt) -> float:
    """Share of the bytes that may move next: more where the change was as predicted, less where it fell short."""
    ratio = attempt["measured"] / attempt["predicted"]
    if ratio > 0.5:
        return min(1.0, 1.5 * share)
    return share / 2 if ratio < 0.25 else share


def _cut(tokens: Tensor) -> Tensor:
    """Rows ``[rows, seq_len]`` in equal pieces of `ROW_LENGTH` tokens, where these make up a row."""
    whole = tokens.shape[1] % ROW_LENGTH == 0 and tokens.shape[1] > ROW_LENGTH
    return tokens.reshape(-1, ROW_LENGTH) if whole else tokens


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0
