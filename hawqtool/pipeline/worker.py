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
from hawqtool.pipeline.stages.rows import load_ends_ahead
from hawqtool.pipeline.stages.token_importance import compile_kernels
from hawqtool.runtime.launched import world_size
from hawqtool.runtime.ranks import Ranks, joined, take_gpu


class _Beginning(NamedTuple):
    """What the leader tells the others once it has checked everything: rows per pass, and the model's hashes."""

    batch_size: int
    content: ContentRecord


class Others:
    """The other processes of a run, for the one that leads.

    They are waited for when they are wanted: what the leader says and refuses before that needs none of them.

    Args:
        cuda: Whether each computes on a GPU of its own.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._ranks: Ranks | None = None

    def joined(self) -> Ranks:
        """All processes of the run, this one alone where there are no others."""
        self._ranks = self._ranks or joined(self._cuda)
        return self._ranks

    def leave(self) -> None:
        """Exchange nothing any more."""
        if self._ranks is not None:
            self._ranks.leave()


@contextmanager
def leading(config: RunConfig) -> Iterator[Others]:
    """The other processes of this run, which this one leads; they are let go at the end, unless it failed.

    Raises:
        UsageError: If there are fewer GPUs than processes, or several are asked for and nothing started them.
    """
    if config.gpus > 1 and world_size() == 1:
        raise UsageError(
            f"gpus is {config.gpus}, but this is one process alone; the command line starts several, as does torchrun"
        )
    cuda = chosen_device(config.device).type == "cuda"
    if cuda:
        take_gpu()
    others = Others(cuda)
    try:
        yield others
        others.joined().dismiss()  # also of a run that had nothing to do
    except HawqError:
        others.joined()  # whose other end, which closes now, they wait at
        raise
    finally:
        others.leave()


def begin_ranks(others: Others, job: Job) -> Ranks:
    """Have the other ranks prepare the job that the leader has prepared; gives all of them."""
    ranks = others.joined()
    if ranks.size > 1:
        assert job.index.content is not None  # `prepare` makes one
        ranks.from_owner(_Beginning(job.settings.batch_size, job.index.content), 0)
    return ranks


def work(config: RunConfig, writes: bool = True) -> None:
    """Join the ranks, wait for the leader's beginning, then do what it hands out until the run ends.

    Args:
        config: The run's configuration.
        writes: As in `prepare`, for what the leader does.

    Raises:
        HawqError: As `prepare`.
    """
    if cuda := chosen_device(config.device).type == "cuda":
        take_gpu()
    # Beside the leader, which checks more than this. What is not here yet, it downloads alone.
    early = _tried(config, writes) if Path(config.model).is_dir() else None
    if isinstance(early, Job):
        compile_kernels(early)
        load_ends_ahead(early)
    ranks = joined(cuda)
    try:
        beginning = ranks.awaited()
        if beginning is not None:  # else the run had nothing to do
            if isinstance(early, HawqError):
                raise early
            job = (early or prepare(config, writes=writes)).with_batch_size(beginning.batch_size)
            assert job.index.content is not None  # `prepare` makes one
            job.index.content.take_over(beginning.content)
            ranks.serve(replace(job, ranks=ranks))
    finally:
        ranks.leave()


def _tried(config: RunConfig, writes: bool) -> Job | HawqError:
    """The job, or what it fails by: of what the leader refuses too, nothing is to be said here."""
    try:
        return prepare(config, writes=writes)
    except HawqError as error:
        return error
