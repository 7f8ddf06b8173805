"""Checks of the folder that a run ships: verification, load trial, hashes; on a GPU beside the folder's evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeVar

from torch import Tensor

from hawqtool.export.engines import TRANSFORMERS, engines
from hawqtool.export.manifest import Entry, weight_entries
from hawqtool.export.verify import verify_folder
from hawqtool.export.writer import copy_small_files
from hawqtool.pipeline.load_trial.trial import LoadTrial, TrialProcess, try_loading
from hawqtool.pipeline.run.files import PART
from hawqtool.pipeline.run.identity import check_copies
from hawqtool.pipeline.run.job import Job
from hawqtool.records import BitPlan
from hawqtool.report.schema import Engine
from hawqtool.runtime.background import beside

T = TypeVar("T")


class ShippedChecks:
    """Verifies the folder that is shipped, has transformers load it, and hashes its weights.

    All take the host and the disk for the most part: on a GPU each begins in a thread of its own as soon as it is
    certain which folder that is, while the folder is evaluated; a process that tries the folder on the GPU verifies it
    too. What the trial is compared with waits until something is asked for: it unpacks all weights, and launches of the
    evaluation would wait for those. A CPU does one after the other when they are asked for.

    Args:
        job: The original model.
        rows: Rows for the trial.
        process: That of the trial, where it was started ahead.
    """

    def __init__(self, job: Job, rows: Tensor, process: TrialProcess | None = None) -> None:
        self.job, self.rows, self.process = job, rows, process
        self._folder: Path | None = None
        self._asked = Event()
        self._verify: Callable[[], tuple[str, ...]] = tuple
        self._trial: Callable[[], LoadTrial] | None = None
        self._hashes: Callable[[], dict[str, Entry]] = dict

    def begin(self, folder: Path, plan: BitPlan) -> None:
        """Copy the model's small files into a written folder, and begin where that costs nothing; once for a folder.

        Raises:
            InputLostError: If a small file is not what the run began with.
        """
        if folder == self._folder:
            return
        job = self.job
        for left in folder.rglob(f".*{PART}"):  # by a run that was killed while it wrote them
            left.unlink()
        began_with = job.index.content.files if job.index.content else {}
        copied = copy_small_files(job.index.folder, folder)
        check_copies(folder, {name: began_with.get(name, "") for name in copied})
        self._folder = folder
        tried = next(entry for entry in result_engines(job, plan) if entry["engine"] == TRANSFORMERS)["loads"]
        self._hashes = self._aside(partial(weight_entries, folder))
        ahead = bool(tried and self.process and self.process.device != "cpu")  # it verifies too
        self._trial = (
            self._aside(partial(try_loading, job, folder, self.rows, self.process, ahead, self._asked.wait))
            if tried
            else None
        )
        self._verify = partial(self._found, folder) if ahead else self._aside(partial(_problems, job, folder))

    def _found(self, folder: Path) -> tuple[str, ...]:
        """What the process of the trial found; where it came to no end, what is found now."""
        trial = self.trial()
        known = None if trial is None else trial.problems
        return _problems(self.job, folder) if known is None else known

    def _aside(self, work: Callable[[], T]) -> Callable[[], T]:
        return beside(work) if self.job.device.type == "cuda" else work

    def problems(self) -> tuple[str, ...]:
        """What verification found, a line each; waits for it."""
        self._asked.set()
        return self._verify()

    def hashes(self) -> dict[str, Entry]:
        """The manifest's entries of the weights; waits for them."""
        return self._hashes()

    def trial(self) -> LoadTrial | None:
        """What the trial gave; None where the formats promise nothing that could be tried. Waits for it."""
        self._asked.set()
        return None if self._trial is None else self._trial()


def result_engines(job: Job, plan: BitPlan) -> list[Engine]:
    """What each engine does with the result of a plan, by its formats and shapes."""
    shapes = {m.name: (m.out_features, m.in_features) for unit in job.units for m in unit.members}
    cache = job.config.kv_cache if job.caches else None
    return engines(job.layer_formats(plan.formats), shapes, job.structure.obstacle, bool(job.tables), cache)


def _problems(job: Job, folder: Path) -> tuple[str, ...]:
    return verify_folder(folder, job.index.folder, job.device, sealed=False).problems
