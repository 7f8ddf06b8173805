"""Plans that are rounded, written and evaluated, each distinct one once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hawqtool.evaluation.divergence import as_evaluation, as_record
from hawqtool.evaluation.paired import balanced_divergence
from hawqtool.pipeline.load_trial.checks import ShippedChecks
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.folder import REMOVED
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.write import ROUNDING, Ahead, is_as_written, round_side_by_side, round_to_folder
from hawqtool.records import BitPlan, Evaluation, Rows, UnitFormats
from hawqtool.report.plan_comparison import PlanQuality
from hawqtool.report.schema import RoundingResult
from hawqtool.runtime.stage_timer import Stopwatch, Timings
from hawqtool.runtime.store import Saved

_QUALITY, _EVALUATING = "quality", "evaluating"

JUDGED = ("selection", "report")
"""Sets of rows on which every plan is evaluated: the first chooses, the second is what is reported."""


@dataclass(frozen=True)
class Trial:
    """A plan that was rounded, written and evaluated.

    Args:
        name: Name under which it was first tried.
        plan: The plan.
        folder: Where it is written, while it is kept; `TrialRunner.folder` writes it again where it is not.
        rounding: What `round_to_folder` returned.
        quality: Evaluation by set of rows; empty where nothing is evaluated.
    """

    name: str
    plan: BitPlan
    folder: Path
    rounding: RoundingResult
    quality: dict[str, Evaluation]

    @property
    def selection(self) -> float:
        """Divergence on the selection rows, each source of them counting alike."""
        return balanced_divergence(self.quality["selection"])

    def record(self, predicted: dict[str, float]) -> PlanQuality:
        """JSON form: quality on report and selection rows, sizes, formats.

        Args:
            predicted: Predicted loss by metric.
        """
        found: PlanQuality = {
            **as_record(self.quality["report"]),
            "formats": sorted({fmt.label for fmt in self.plan.formats.values()}),
            "stored_bytes": self.plan.stored_bytes,
            "bpw_linears": self.plan.bpw,
            "total_bytes": self.rounding["total_bytes"],
            "rounding_seconds": self.rounding["seconds"],
            "predicted": predicted,
        }
        if "selection" in self.quality:
            found["selection"] = as_record(self.quality["selection"])
        return found


class TrialRunner:
    """Tries plans; the original is run once, a plan that was tried before is not tried again.

    Args:
        context: The run; its store keeps roundings, block by block, and evaluations.
        sets: Rows by role.
        work: Folder for the written trials; the caller removes it.
        timings: Seconds by stage, added to.
        checks: Begins with the folder of a plan that is shipped in any case (see ``certain``) as soon as it is
            written; None for nothing.

    Attributes:
        certain: `formats_key` of the plan that is shipped whatever its evaluation says; empty where that decides.
    """

    def __init__(
        self,
        context: RunContext,
        sets: dict[str, Rows],
        work: Path,
        timings: Timings,
        checks: ShippedChecks | None = None,
    ) -> None:
        self.context, self.sets, self.work, self.timings = context, sets, work, timings
        self.checks, self.certain = checks, ""
        self._tried: dict[str, Trial] = {}
        self._ahead: set[str] = set()
        self.evaluator: Evaluator | None = None
        if context.job.config.evaluates:
            with Stopwatch(timings, "evaluate"):
                self.evaluator = Evaluator(context, {role: sets[role] for role in JUDGED if role in sets})

    def original(self) -> Evaluation:
        """The original model on the report rows."""
        return self._evaluated(None, "original", self.context.saved.part("original"))["report"]

    def run_trial(self, name: str, plan: BitPlan, roles: Collection[str] = JUDGED) -> Trial:
        """Round, write and evaluate a plan on some sets of rows, or return what that gave before."""
        key = formats_key(plan.formats)
        if key not in self._tried:
            saved, folder = self.context.saved.part(key), self.work / key
            if folder.exists() and key not in self._ahead:
                self._check_written(plan, folder)
            rounding = saved.load(ROUNDING)
            if rounding is None or not (folder.exists() or saved.load(_QUALITY)):
                rounding = self._rounded(plan, folder, name)
            if self.checks is not None and key == self.certain and folder.exists():
                self.checks.begin(folder, plan)
            quality = self._evaluated(folder, name, saved, roles)
            self._tried[key] = Trial(name, plan, folder, rounding, quality)
        return self._tried[key]

    def round_ahead(self, plans: dict[str, BitPlan]) -> None:
        """Round plans that are going to be tried in any case side by side, as far as there are ranks for that.

        Args:
            plans: By the names under which they will be tried.
        """
        ranks = self.context.ranks.size
        distinct = {formats_key(plan.formats): (name, plan) for name, plan in reversed(plans.items())}
        left = [
            Ahead(name, key, plan, self.work / key, self._has_rounding(plan, key))
            for key, (name, plan) in reversed(distinct.items())
        ]
        while min(ranks, len(left)) > 1:
            wave, left = left[:ranks], left[ranks:]
            with Stopwatch(self.timings, f"round {' | '.join(one.label for one in wave)}"):
                round_side_by_side(self.context, wave, self.sets.get("calibration"))
            self._ahead |= {one.key for one in wave}
            self.timings.save()

    def _has_rounding(self, plan: BitPlan, key: str) -> bool:
        """Whether an earlier start has rounded a plan, and has the folder or all that was wanted of it."""
        saved, folder = self.context.saved.part(key), self.work / key
        if folder.exists():
            self._check_written(plan, folder)
        if saved.load(ROUNDING) and (folder.exists() or saved.load(_QUALITY)):
            return True
        if folder.exists():  # its record is damaged
            self._remove(folder)
        return False

    def _check_written(self, plan: BitPlan, folder: Path) -> None:
        """Remove a folder of an earlier start that is not as it was written, so that it is written again."""
        part = self.context.part(folder.name)
        if not is_as_written(part, plan, folder):
            self.context.reporter.warn(f"{folder}, which an earlier run wrote, is damaged; it is written again")
            self._remove(folder)
            part.saved.drop(ROUNDING, _QUALITY)

    def folder(self, trial: Trial) -> Path:
        """The written folder of a trial; it is written again where `keep_only` removed it."""
        if not trial.folder.exists():
            self._rounded(trial.plan, trial.folder, trial.name)
        return trial.folder

    def _rounded(self, plan: BitPlan, folder: Path, name: str) -> RoundingResult:
        if folder.exists():  # an earlier start wrote it, and its record is damaged
            self._remove(folder)
        with Stopwatch(self.timings, f"round {name}"):
            part = self.context.part(folder.name)
            rounding = round_to_folder(part, plan, self.sets.get("calibration"), folder, name)
        self.timings.save()
        return rounding

    def _evaluated(
        self, folder: Path | None, name: str, saved: Saved, roles: Collection[str] | None = None
    ) -> dict[str, Evaluation]:
        known = saved.load(_QUALITY)
        if known is not None:
            return {role: as_evaluation(values) for role, values in known.items()}
        if self.evaluator is None:
            return {}
        with Stopwatch(self.timings, "evaluate"):
            quality = self.evaluator.evaluate(folder, name, saved.part(_EVALUATING), roles)
        saved.save(_QUALITY, {role: vars(evaluation) for role, evaluation in quality.items()})
        saved.part(_EVALUATING).drop()
        self.timings.save()
        return quality

    def keep_only(self, trials: list[Trial]) -> None:
        """Remove the folders of all other trials: each is as large as the result."""
        kept = {trial.folder for trial in trials}
        for folder in (c.folder for c in self._tried.values() if c.folder not in kept and c.folder.exists()):
            self._remove(folder)

    @staticmethod
    def _remove(folder: Path) -> None:
        """Remove a folder; it is renamed first, so that one under its name is complete at every moment."""
        removed = folder.with_name(f"{folder.name}{REMOVED}")
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def formats_key(formats: UnitFormats) -> str:
    """A short name for formats by unit, the same for the same formats."""
    text = "\n".join(f"{unit} {fmt.label}" for unit, fmt in sorted(formats.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
