"""Plans that are rounded, written and evaluated, each distinct one once."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqtool.pipeline.evaluating import Evaluator, as_record
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.rounding import round_to_folder
from hawqtool.records import BitPlan, Evaluation, Rows

JUDGED = ("selection", "report")
"""Sets of rows on which every plan is evaluated: the first chooses, the second is what is reported."""


@dataclass(frozen=True)
class Candidate:
    """A plan that was rounded, written and evaluated.

    Args:
        name: Name under which it was first tried.
        plan: The plan.
        folder: The written folder, while it is kept.
        rounding: What `round_to_folder` returned.
        quality: Evaluation by set of rows.
    """

    name: str
    plan: BitPlan
    folder: Path
    rounding: dict[str, Any]
    quality: dict[str, Evaluation]

    @property
    def selection(self) -> float:
        """Divergence on the selection rows."""
        return self.quality["selection"].divergence

    def record(self) -> dict[str, Any]:
        """JSON form: quality on the report rows, sizes, formats."""
        labels = sorted({fmt.label for fmt in self.plan.formats.values()})
        return as_record(self.quality["report"]) | {
            "formats": labels,
            "stored_bytes": self.plan.stored_bytes,
            "bpw_linears": self.plan.bpw,
            "total_bytes": self.rounding["total_bytes"],
            "rounding_seconds": self.rounding["seconds"],
        }


class Workbench:
    """Tries plans; the original is run once, a plan that was tried before is not tried again.

    Args:
        job: The model.
        sets: Rows by role.
        work: Folder for the written candidates; the caller removes it.
        reporter: Progress.
        timings: Seconds by stage, added to.
    """

    def __init__(
        self, job: Job, sets: dict[str, Rows], work: Path, reporter: Reporter, timings: dict[str, float]
    ) -> None:
        self.job, self.sets, self.work, self.reporter, self.timings = job, sets, work, reporter, timings
        self._tried: dict[tuple[object, ...], Candidate] = {}
        with Stopwatch(timings, "evaluate"):
            self.evaluator = Evaluator(job, {role: sets[role] for role in JUDGED}, reporter)

    def original(self) -> Evaluation:
        """The original model on the report rows."""
        with Stopwatch(self.timings, "evaluate"):
            return self.evaluator.evaluate(None, "original")["report"]

    def attempt(self, name: str, plan: BitPlan) -> Candidate:
        """Round, write and evaluate a plan, or return what that gave before."""
        key = tuple(plan.formats[unit.name] for unit in self.job.units)
        if key not in self._tried:
            folder = self.work / f"{len(self._tried)}"
            with Stopwatch(self.timings, f"round {name}"):
                rounding = round_to_folder(self.job, plan, self.sets["calibration"], folder, self.reporter, name)
            with Stopwatch(self.timings, "evaluate"):
                quality = self.evaluator.evaluate(folder, name)
            self._tried[key] = Candidate(name, plan, folder, rounding, quality)
        known = self._tried[key]
        if not known.folder.exists():
            round_to_folder(self.job, plan, self.sets["calibration"], known.folder, self.reporter, name)
        return known

    def keep_only(self, candidates: list[Candidate]) -> None:
        """Remove the folders of all other candidates: each is as large as the result."""
        kept = {candidate.folder for candidate in candidates}
        for candidate in self._tried.values():
            if candidate.folder not in kept:
                shutil.rmtree(candidate.folder, ignore_errors=True)


class Stopwatch:
    """Adds the seconds of a block of code to a stage."""

    def __init__(self, timings: dict[str, float], stage: str) -> None:
        self.timings, self.stage = timings, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.timings[self.stage] = self.timings.get(self.stage, 0.0) + time.perf_counter() - self.start
