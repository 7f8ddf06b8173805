"""A rank that does not lead: it prepares the same model, and does what the leader hands out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hawqtool.checkpoint.content import ContentRecord
from hawqtool.config import RunConfig
from hawqtool.errors import HawqError, UsageError
from hawqtool.pipeline.run.job import Job, chosen_device, prepare
from hawqtool.runtime.launched import world_size
from hawqtool.runtime.ranks import Ranks, joined


class _Beginning(NamedTuple):
    """What the leader tells the others once it has checked everything: rows per pass, and the model's hashes."""

    batch_size: int
    content: ContentRecord | None


@contextmanager
def leading(config: RunConfig) -> Iterator[Ranks]:
    """The ranks of this run, which this process leads; the others are let go at the end, unless it failed.

    Raises:
        UsageError: If there are fewer GPUs than processes, or several are asked for and nothing started them.
    """
    if config.gpus > 1 and world_size() == 1:
        raise UsageError(
            f"gpus is {config.gpus}, but this is one process alone; the command line starts several, as does torchrun"
        )
    ranks = joined(chosen_device(config.device).type == "cuda")
    try:
        yield ranks
        ranks.dismiss()
    finally:
        ranks.leave()


def begin_ranks(ranks: Ranks, job: Job) -> None:
    """Have the other ranks prepare the job that the leader has prepared."""
    if ranks.size > 1:
        ranks.from_owner(_Beginning(job.settings.batch_size, job.index.content), 0)


def work(config: RunConfig, writes: bool = True) -> None:
    """Join the ranks, wait for the leader's beginning, then do what it hands out until the run ends.

    Args:
        config: The run's configuration.
        writes: As in `prepare`, for what the leader does.

    Raises:
        HawqError: As `prepare`.
    """
    ranks = joined(chosen_device(config.device).type == "cuda")
    try:
        # Beside the leader, which checks more than this. What is not here yet, it downloads alone.
        early = _tried(config, writes) if Path(config.model).is_dir() else None
        beginning = ranks.awaited()
        if beginning is not None:  # else the run had nothing to do
            if isinstance(early, HawqError):
                raise early
            job = (early or prepare(config, writes=writes)).with_batch_size(beginning.batch_size)
            ranks.serve(replace(job, index=replace(job.index, content=beginning.content), ranks=ranks))
    finally:
        ranks.leave()


def _tried(config: RunConfig, writes: bool) -> Job | HawqError:
    """The job, or what it fails by: of what the leader refuses too, nothing is to be said here."""
    try:
        return prepare(config, writes=writes)
    except HawqError as error:
        return error
