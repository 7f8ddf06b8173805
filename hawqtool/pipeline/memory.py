"""What a run does when the memory of a GPU does not suffice."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hawqtool.errors import ResourceError, one_line
from hawqtool.pipeline.identity import run_identity
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.rows import SAMPLED
from hawqtool.pipeline.run_folder import RunFolder

MOST_HALVINGS = 2
"""What does not fit in a quarter of the rows per pass is no matter of activations."""

_SLICES = "smaller-slices"


Work = Callable[[Job, list[str]], dict[str, Any]]


def halving_slices(job: Job, warnings: list[str], run: RunFolder, reporter: Reporter, work: Work) -> dict[str, Any]:
    """Do the work; when GPU memory runs out, do all of it again with half the rows per slice, at most twice.

    Rows per slice change floating-point sums, so no result may mix two values: the work starts anew, every halving is
    a warning, and a value that the user gave is kept to.

    Args:
        job: The model.
        warnings: Those of halvings before an interruption.
        run: Its folder, begun; remembers a halving for a run that resumes.
        reporter: Told of every halving.
        work: Called with the job and the warnings.

    Raises:
        ResourceError: If memory is still short.
    """
    fixed = job.config.rows_per_slice is not None
    for left in reversed(range(MOST_HALVINGS + 1)):
        try:
            return work(job, warnings)
        except torch.OutOfMemoryError as error:
            gist = one_line(error)
        # Only here, outside the handler, are the frames gone that hold the tensors of the attempt.
        gc.collect()
        torch.cuda.empty_cache()
        rows = job.rows_per_slice
        if fixed or not left or rows == 1:
            break
        text = f"out of GPU memory with {rows} rows per slice: everything was done again with {rows // 2}"
        reporter.warn(text)
        warnings = [*warnings, text]
        job = _with_rows_per_slice(job, rows // 2)
        run.begin_anew(run_identity(job), keep=(SAMPLED,))
        run.saved.save(_SLICES, {"rows_per_slice": rows // 2, "warnings": warnings})
    raise ResourceError(
        f"out of GPU memory with {rows} rows per slice ({gist}); lower --rows-per-slice, --num-samples or --seq-len, "
        "or give --exchanges 0, which needs no more than one block on the device"
    )


def resumed_slices(job: Job, run: RunFolder) -> tuple[Job, list[str]]:
    """The job with the rows per slice to which the unfinished run had fallen, and the warnings of that."""
    known = run.saved.load(_SLICES)
    if known is None or job.config.rows_per_slice is not None:
        return job, []
    return _with_rows_per_slice(job, known["rows_per_slice"]), known["warnings"]


def _with_rows_per_slice(job: Job, rows: int) -> Job:
    return replace(job, config=job.config.model_copy(update={"rows_per_slice": rows}))
