"""Evaluate written folders against the original model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.evaluation.divergence import evaluate_hidden
from hawqtool.export.packed import PackedReader
from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.model.sweep import ModelStream
from hawqtool.pipeline.job import Job, prepare
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.rows import evaluation_rows
from hawqtool.records import Evaluation, Rows


class Evaluator:
    """Compares packed folders with the original on fixed sets of rows; the original is run once.

    Args:
        job: The original model.
        sets: Rows by role; all are run together.
        reporter: Progress.
        saved: Keeps what the original gave.
    """

    def __init__(self, job: Job, sets: dict[str, Rows], reporter: Reporter, saved: Saved = NOTHING_SAVED) -> None:
        self.job, self.sets, self.reporter = job, sets, reporter
        self.seconds = 0.0
        self.stream = job.stream()
        known = saved.load("original-states")
        if known is None:
            self.reference = self._hidden(self.stream, "original")
            saved.save("original-states", self.reference)
        else:
            self.reference = {role: states.to(job.device) for role, states in known.items()}

    def _hidden(self, stream: ModelStream, label: str) -> dict[str, Tensor]:
        start = time.perf_counter()
        count = len(self.job.structure.blocks)
        states = {}
        for position, (role, rows) in enumerate(self.sets.items()):
            first, total = position * count, len(self.sets) * count
            states[role] = stream.final_hidden(
                rows.tokens,
                self.job.rows_per_slice,
                lambda index, first=first, total=total: self.reporter.progress(  # type: ignore[misc]
                    f"evaluating {label}", first + index + 1, total
                ),
            )
        self.seconds += time.perf_counter() - start
        return states

    def evaluate(self, folder: Path | None, label: str) -> dict[str, Evaluation]:
        """Quality of a written folder (None: the original itself) by role."""
        stream = self.stream if folder is None else self.job.packed_stream(folder)
        states = self.reference if folder is None else self._hidden(stream, label)
        start = time.perf_counter()
        results = {
            role: evaluate_hidden(self.stream, stream, rows.tokens, self.reference[role], states[role])
            for role, rows in self.sets.items()
        }
        self.seconds += time.perf_counter() - start
        return results


def as_record(evaluation: Evaluation) -> dict[str, Any]:
    """JSON form of an evaluation: the divergence under the name of its measure, without the row values."""
    others = {name: getattr(evaluation, name) for name in ("perplexity", "same_top", "cosine")}
    return {
        evaluation.measure: evaluation.divergence,
        f"{evaluation.measure}_stderr": evaluation.stderr,
        "num_tokens": evaluation.num_tokens,
    } | {name: value for name, value in others.items() if value is not None}


def run_evaluate(config: RunConfig, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """``hawqtool evaluate``: perplexity and KL of a written folder against its original.

    Raises:
        InputError: If no evaluation text is given, or the folder belongs to another model.
    """
    if config.eval_data is None:
        raise InputError("--eval-data is needed: text that was not used for calibration")
    job = prepare(config, reporter, writes=False)
    candidate = PackedReader(folder)
    missing = [n for n in job.structure.linears if f"{n}.weight" not in candidate]
    if missing:
        raise InputError(f"{folder} has no layer {missing[0]}; is {config.model} the model that it was made from?")
    rows = evaluation_rows(job, config.eval_data)
    evaluator = Evaluator(job, {"report": rows}, reporter)
    with torch.no_grad():
        original = evaluator.evaluate(None, "original")["report"]
        quantized = evaluator.evaluate(folder, "quantized")["report"]
    return {
        "schema": "hawqtool.evaluation/1",
        "measure": original.measure,
        "rows": {"source": rows.source, "fingerprint": rows.fingerprint, "count": len(rows.tokens)},
        "original": as_record(original),
        "quantized": as_record(quantized),
    }
