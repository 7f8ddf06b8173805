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
from hawqtool.model.heap import release_freed_pages
from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.model.sweep import ModelStream
from hawqtool.pipeline.job import Job, prepare
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.rows import evaluation_rows
from hawqtool.records import Evaluation, Rows

_CPU_ROWS = 2
"""Most rows of a pass on a CPU: more are no faster and take more memory."""


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
            walks = saved.part("original-walk")
            self.reference = {role: self._hidden(self.stream, "original", role, walks.part(role)) for role in sets}
            saved.save("original-states", self.reference)
            walks.drop()
        else:
            self.reference = {role: states.to(job.device) for role, states in known.items()}

    def _hidden(self, stream: ModelStream, label: str, role: str, saved: Saved) -> Tensor:
        start = time.perf_counter()
        count, rows = len(self.job.structure.blocks), self.sets[role].tokens
        first, total = list(self.sets).index(role) * count, len(self.sets) * count

        def tell(index: int) -> None:
            self.reporter.progress(f"evaluating {label}", first + index + 1, total)

        together = self.job.rows_per_slice
        if self.job.device.type == "cpu":
            together = min(together, _CPU_ROWS)
        states = stream.final_hidden(rows, together, tell, saved)
        self.seconds += time.perf_counter() - start
        return states

    def evaluate(self, folder: Path | None, label: str, saved: Saved = NOTHING_SAVED) -> dict[str, Evaluation]:
        """Quality of a written folder (None: the original itself) by role.

        Args:
            folder: Packed checkpoint.
            label: Its name in the progress.
            saved: Keeps what is known already; of no use once this has returned.
        """
        stream = self.stream if folder is None else self.job.packed_stream(folder)
        results = {}
        for role, rows in self.sets.items():
            known = saved.load(role)
            if known is None:
                states = self.reference[role]
                if folder is not None:
                    states = self._hidden(stream, label, role, saved.part(role))
                release_freed_pages()  # logits need other sizes than blocks do
                start = time.perf_counter()
                found = evaluate_hidden(self.stream, stream, rows.tokens, self.reference[role], states)
                self.seconds += time.perf_counter() - start
                saved.save(role, vars(found))
                saved.part(role).drop()
            else:
                found = as_evaluation(known)
            results[role] = found
        self.stream.release_ends()
        return results


def as_evaluation(values: dict[str, Any]) -> Evaluation:
    """An evaluation from its saved fields."""
    return Evaluation(**values | {"row_divergence": tuple(values["row_divergence"])})


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
