"""Planned GGUF files, rounded and judged: one, or the smallest that meets a quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from hawqtool.allocation.quality_target import MeasuredPlan, smallest_meeting
from hawqtool.evaluation.divergence import as_evaluation, as_record
from hawqtool.export.gguf.writer import GgufWriter
from hawqtool.pipeline.gguf.evaluation import GgufEvaluator
from hawqtool.pipeline.gguf.planner import GgufPlanner, types_of
from hawqtool.pipeline.gguf.round_tensors import Findings, GgufRounder
from hawqtool.pipeline.run.context import RunContext
from hawqtool.records import BitPlan, Evaluation, Rows
from hawqtool.report.documents import GgufQuality
from hawqtool.report.schema import Search, SearchTrial

_FINISHED, _JUDGED = "finished", "judged"


@dataclass(frozen=True)
class GgufTrial:
    """A plan that was carried out.

    Args:
        plan: Types by unit.
        path: The file; of plans that a search left behind it is removed.
        findings: What the record says of its matrices.
    """

    plan: BitPlan
    path: Path
    findings: Findings


class GgufTrials:
    """Carries out plans in the folder of a run.

    Args:
        context: The run; its store keeps what is finished.
        planner: Plans and the rounding of embedding and output.
        sets: Rows by role.
        calibration: Calibration rows with their importance.
        folder: Where files are written.
    """

    def __init__(
        self,
        context: RunContext,
        planner: GgufPlanner,
        sets: Mapping[str, Rows],
        calibration: Rows | None,
        folder: Path,
    ) -> None:
        self._context, self._planner, self._calibration, self._folder = context, planner, calibration, folder
        self._gguf = planner.gguf
        roles = ("report",) if self._gguf.job.config.target_kl is None else ("selection", "report")
        self._sets = {role: sets[role] for role in roles if role in sets}

    def run(self, plan: BitPlan) -> GgufTrial:
        """Round a plan and write its file, or take both from an earlier run."""
        context, path = self._part(plan), self._folder / f"{plan.stored_bytes}.gguf"
        known = context.saved.load(_FINISHED)
        if known is not None and path.is_file():
            return GgufTrial(plan, path, Findings(**known))
        gguf = self._gguf
        with GgufWriter(gguf.template, gguf.layout(types_of(plan)), path, resumes=True) as writer:
            found = GgufRounder(context, gguf, plan, self._planner.ends, writer).run(self._calibration)
        context.saved.save(_FINISHED, asdict(found))
        return GgufTrial(plan, path, found)

    def smallest(self, bound: float) -> tuple[Search, GgufTrial]:
        """The smallest plan whose divergence on the selection rows is at most a bound, or the best where none is.

        Returns:
            What was tried, for the record, and the plan.
        """
        tried: dict[MeasuredPlan, tuple[GgufTrial, dict[str, float]]] = {}

        def measure(budget: int) -> MeasuredPlan:
            trial = self.run(self._planner.plan(budget))
            found = {role: one.divergence for role, one in self._evaluated(trial).items()}
            measured = MeasuredPlan(trial.plan.stored_bytes, found["selection"])
            tried[measured] = trial, found
            best = _best(tried, bound)
            for other, (left, _) in tried.items():
                if other != best:
                    left.path.unlink(missing_ok=True)
            return measured

        found = smallest_meeting(self._planner.curve().points, measure, bound)
        entries: dict[MeasuredPlan, SearchTrial] = {
            measured: {"stored_bytes": measured.stored_bytes, "bpw_linears": trial.plan.bpw, "divergence": divergence}
            for measured, (trial, divergence) in tried.items()
        }
        missed = found.missed if found.met else None
        record: Search = {
            "bound": bound,
            "met": found.met is not None,
            "largest_that_misses": None if missed is None else entries[missed],
            "trials": [entries[measured] for measured in found.measured_plans],
        }
        return record, tried[_best(tried, bound)][0]

    def quality(self, trial: GgufTrial) -> GgufQuality | None:
        """Quality of original and file on the report rows; None where that is not asked for."""
        if not self._gguf.job.config.evaluates:
            return None
        original = self._evaluator.evaluate(None, "original")["report"]
        return {"original": as_record(original), "quantized": as_record(self._evaluated(trial)["report"])}

    @cached_property
    def _evaluator(self) -> GgufEvaluator:
        return GgufEvaluator(self._context, self._sets, self._gguf.places)

    def _part(self, plan: BitPlan) -> RunContext:
        return self._context.part(f"file-{plan.stored_bytes}")

    def _evaluated(self, trial: GgufTrial) -> dict[str, Evaluation]:
        saved = self._part(trial.plan).saved
        known = saved.load(_JUDGED)
        if known is not None:
            return {role: as_evaluation(one) for role, one in known.items()}
        label = f"plan of {trial.plan.bpw:.3f} bits per weight"
        found = self._evaluator.evaluate(trial.path, label, saved.part("judging"))
        saved.save(_JUDGED, {role: vars(one) for role, one in found.items()})
        return found


def _best(tried: Mapping[MeasuredPlan, object], bound: float) -> MeasuredPlan:
    """The smallest plan that meets the bound; where none does, the one of least divergence."""
    met = [measured for measured in tried if measured.measured <= bound]
    return min(met, key=lambda one: one.stored_bytes) if met else min(tried, key=lambda one: one.measured)
