"""What every stage of a run is given: the job, whom to tell of it, and where finished work is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hawqtool.pipeline.run.job import Job
from hawqtool.runtime.background import Background
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.reporter import Reporter, Silent
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.streaming.kept_roundings import KeptRoundings

_BESIDE_BYTES = 64 << 20
"""Content of more bytes is saved in the background: an 8B model's moments for output feedback have 3.3 GB."""


@dataclass(frozen=True)
class RunContext:
    """A job with its reporter and its store.

    Args:
        job: The model.
        reporter: Narration and progress (default: none).
        saved: Keeps finished work for a run that resumes (default: nothing is kept).
        ranks: Processes that share the work, of which this one leads.
        background: Writes beside the work what a run that is resumed would need.
        roundings: Those that measuring leaves for the comparison of plans.
    """

    job: Job
    reporter: Reporter = field(default_factory=Silent)
    saved: Saved = NOTHING_SAVED
    ranks: Ranks = ALONE
    background: Background = field(default_factory=Background)
    roundings: KeptRoundings = field(default_factory=KeptRoundings)

    def part(self, name: str) -> RunContext:
        """The same with keys of its own for one part of the work."""
        return replace(self, saved=self.saved.part(name))

    def shared(self, function: Callable[..., Any], *args: Any) -> Job:
        """Have all other ranks call ``function(job, *args)``.

        Returns:
            The job with which the leader is to do its own share at once; only with this one are its rows shared.
        """
        self.ranks.hand_out(function, *args)
        return replace(self.job, ranks=self.ranks)

    def save(self, saved: Saved, key: str, content: Any, size: int) -> None:
        """Keep a content of so many bytes, which must not change any more; where that is much, while the run goes on.

        Raises:
            ResourceError: If the disk refuses; of what is saved meanwhile, later.
        """
        if size > _BESIDE_BYTES:
            self.background.start(partial(saved.save, key, content))
        else:
            saved.save(key, content)

    def keep(self, name: str, value: Any) -> None:
        """Have all ranks keep a value under ``job.ranks.kept`` for later tasks; what they have is not sent again."""
        if self.ranks.size > 1 and self.ranks.kept.get(name) is not value:
            self.shared(_keep, name, value)
            self.ranks.kept[name] = value

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """Reports ``done`` of ``total`` steps of a stage."""
        return partial(self.reporter.progress, stage)


def _keep(job: Job, name: str, value: Any) -> None:
    job.ranks.kept[name] = value
