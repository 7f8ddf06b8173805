"""The four disjoint sets of rows of a run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hawqtool.config import SELF
from hawqtool.data.generate import generate_rows
from hawqtool.data.tokens import overlap, split_rows, text_rows
from hawqtool.errors import InputError
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.progress import Reporter
from hawqtool.records import Rows

ROLES = ("calibration", "scoring", "selection", "report")
_SMALLEST_SET = 8


def row_counts(num_samples: int, eval_samples: int, separate_report: bool) -> dict[str, int]:
    """Rows of each set taken from the calibration source: rounding, scoring, selecting a plan, reporting."""
    side = max(_SMALLEST_SET, num_samples // 16)
    counts = {"calibration": num_samples, "scoring": side, "selection": side}
    return counts if separate_report else counts | {"report": eval_samples}


def gather_rows(job: Job, reporter: Reporter) -> dict[str, Rows]:
    """Cut or sample the calibration, scoring, selection and report rows.

    Raises:
        InputError: If a source holds too little text, or sets overlap.
    """
    config = job.config
    counts = row_counts(job.num_samples, config.eval_samples, config.eval_data is not None)
    tokenizer = job.tokenizer()
    if config.calibration == SELF:
        reporter.say(f"sampling {sum(counts.values())} rows of {job.seq_len} tokens from the model")
        tokens = generate_rows(
            job.index.folder, tokenizer, sum(counts.values()), job.seq_len, config.seed, job.device, job.dtype,
            lambda done, total: reporter.progress("sampling tokens", done, total),
        )
    else:
        tokens = _known(job, text_rows(tokenizer, Path(config.calibration), job.seq_len, config.seed))
    sets = split_rows(tokens, counts, config.calibration)
    if config.eval_data is not None:
        sets["report"] = evaluation_rows(job, config.eval_data)
    shared = overlap(sets)
    if shared:
        raise InputError(
            f"{shared} rows occur in more than one of the calibration, scoring, selection and report sets; "
            "give text without repetitions, or another --eval-data"
        )
    return sets


def evaluation_rows(job: Job, path: str) -> Rows:
    """The first ``eval_samples`` rows of a text, fewer where it is shorter."""
    tokens = _known(job, text_rows(job.tokenizer(), Path(path), job.seq_len, 0)[: job.config.eval_samples])
    return split_rows(tokens, {"report": max(len(tokens), 2)}, path)["report"]


def _known(job: Job, tokens: Tensor) -> Tensor:
    """The tokens, after checking that the model has an embedding for each."""
    known = job.skeleton.get_input_embeddings().weight.shape[0]
    if tokens.numel() and int(tokens.max()) >= known:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, the model embeds {known} tokens; "
            "expected a tokenizer and weights of one model; download them again"
        )
    return tokens
