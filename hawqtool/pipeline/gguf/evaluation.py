"""Quality of a GGUF file against its original, by our own dequantization in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.evaluation.divergence import as_record
from hawqtool.pipeline.gguf.record import Place, read_record, recorded_places
from hawqtool.pipeline.gguf.source import GgufSource
from hawqtool.pipeline.gguf.verification import require_origin
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.resolved import MOST_REPORT_ROWS
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.rows import evaluation_rows
from hawqtool.records import Rows
from hawqtool.report.documents import EvaluationDocument
from hawqtool.runtime.reporter import Reporter
from hawqtool.streaming.stream import ModelStream


class GgufEvaluator(Evaluator):
    """`Evaluator` of GGUF files.

    Args:
        context: The run.
        sets: Rows to judge by, by role.
        places: Which tensor holds which matrix.
    """

    def __init__(self, context: RunContext, sets: dict[str, Rows], places: Mapping[str, Place]) -> None:
        super().__init__(context, sets)
        self._places = places

    def candidate(self, folder: Path) -> ModelStream:
        """The model with the weights of a file."""
        return self.job.stream(GgufSource(folder, self._places, self.job.index))


def evaluate_gguf(config: RunConfig, path: Path, reporter: Reporter) -> EvaluationDocument:
    """``hawqtool evaluate FILE.gguf``: perplexity and KL of a file that hawqtool wrote against its original.

    Raises:
        InputError: If no evaluation text is given, the record is missing, or the file belongs to another model.
    """
    if config.eval_data is None:
        raise InputError("--eval-data is needed: text that was not used for calibration")
    if config.tasks:
        raise InputError("--tasks are not judged on GGUF files yet; leave them out")
    record = read_record(path)
    job = prepare(config.model_copy(update={"profile": "transformers"}), reporter, writes=False)
    require_origin(path, record, job.index)
    rows = evaluation_rows(job, config.eval_data, config.eval_samples or MOST_REPORT_ROWS)
    evaluator = GgufEvaluator(RunContext(job, reporter), {"report": rows}, recorded_places(path, record))
    original, quantized = (evaluator.evaluate(*what)["report"] for what in ((None, "original"), (path, "quantized")))
    return {
        "schema": "hawqtool.evaluation/1",
        "measure": "kl" if original.measure == "kl" else "embedding_error",
        "rows": {"source": rows.source, "fingerprint": rows.fingerprint, "count": len(rows.tokens)},
        "original": as_record(original),
        "quantized": as_record(quantized),
    }
