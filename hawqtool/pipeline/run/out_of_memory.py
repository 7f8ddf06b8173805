"""What a run does when the memory of a GPU does not suffice."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from hawqtool.errors import ResourceError, one_line
from hawqtool.pipeline.run.checkpoints import SAMPLED
from hawqtool.pipeline.run.folder import RunFolder
from hawqtool.pipeline.run.identity import run_identity
from hawqtool.pipeline.run.job import Job
from hawqtool.report.schema import Report
from hawqtool.runtime.reporter import Reporter

MOST_HALVINGS = 2
"""What does not fit in a quarter of the rows per pass is no matter of activations."""

_BATCHES = "batches"


Work = Callable[[Job, list[str]], Report]


def halving_batch_size(
    job: Job, warnings: list[str], run: RunFolder, reporter: Reporter, work: Work, most: int = MOST_HALVINGS
) -> Report:
    """Do the work; when GPU memory runs out, do all of it again with half the rows per batch, a few times at most.

    Rows per batch change floating-point sums, so no result may mix two values: the work starts anew, every halving is
    a warning, and a value that the user gave is kept to.

    Args:
        job: The model.
        warnings: Those of halvings before an interruption.
        run: Its folder, begun; remembers a halving for a run that resumes.
        reporter: Told of every halving.
        work: Called with the job and the warnings.
        most: How often rows may be halved.

    Raises:
        ResourceError: If memory is still short.
    """
    fixed = job.config.batch_size is not None
    for left in reversed(range(most + 1)):
        try:
            return work(job, warnings)
        except torch.OutOfMemoryError as error:
            gist = one_line(error)
        # Only here, outside the handler, are the frames gone that hold the tensors of the attempt.
        gc.collect()
        torch.cuda.empty_cache()
        rows = job.settings.batch_size
        if fixed or not left or rows == 1:
            break
        text = f"out of GPU memory with {rows} rows per batch: everything was done again with {rows // 2}"
        reporter.warn(text)
        warnings = [*warnings, text]
        job = job.with_batch_size(rows // 2)
        run.begin_anew(run_identity(job), keep=(SAMPLED,))
        remember_batch_size(job, warnings, run)
    raise ResourceError(
        f"out of GPU memory with {rows} rows per batch ({gist}); lower --batch-size, --num-samples or --seq-len, "
        "or give --swaps 0, which needs no more than one block on the device"
    )


def remember_batch_size(job: Job, warnings: list[str], run: RunFolder) -> None:
    """Keep the rows per batch for a run that resumes, perhaps with another limit of memory."""
    run.saved.save(_BATCHES, {"batch_size": job.settings.batch_size, "warnings": warnings})


def resumed_batch_size(job: Job, run: RunFolder) -> tuple[Job, list[str]]:
    """The job with the rows per batch of the unfinished run, and the warnings where it had fallen to them."""
    known = run.saved.load(_BATCHES)
    if known is None or job.config.batch_size is not None:
        return job, []
    return job.with_batch_size(known["batch_size"]), known["warnings"]
