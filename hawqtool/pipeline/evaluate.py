"""``hawqtool evaluate``: perplexity and divergence of a written folder."""

from __future__ import annotations

from pathlib import Path

import torch

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.evaluation.divergence import as_record
from hawqtool.export.config_checks import matching_problems, structure_problems
from hawqtool.export.packed_reader import PackedReader, read_config
from hawqtool.export.stored.weights import packed_modules
from hawqtool.export.verify import origin_problems, rotation_seed
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.resolved import MOST_REPORT_ROWS
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.rows import evaluation_rows
from hawqtool.pipeline.tasks import check_tasks, judge_tasks
from hawqtool.pipeline.worker import Others, begin_ranks, leading
from hawqtool.report.documents import EvaluationDocument
from hawqtool.runtime.reporter import Reporter


def as_written(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the rotation that a folder records; the rows of `evaluate` do not depend on the seed."""
    seed = rotation_seed(folder)
    return config if seed is None else config.model_copy(update={"rotate": "on", "seed": seed})


def run_evaluate(config: RunConfig, folder: Path, reporter: Reporter) -> EvaluationDocument:
    """``hawqtool evaluate``: perplexity and KL of a written folder against its original.

    Raises:
        InputError: If no evaluation text is given, or the folder belongs to another model.
    """
    with leading(config) as others:
        return _evaluated(config, folder, reporter, others)


def _evaluated(config: RunConfig, folder: Path, reporter: Reporter, others: Others) -> EvaluationDocument:
    if config.eval_data is None:
        raise InputError("--eval-data is needed: text that was not used for calibration")
    candidate = PackedReader(folder)
    job = prepare(as_written(config, folder), reporter, writes=False)
    broken = structure_problems(read_config(folder).get("quantization_config"))
    if not broken:
        broken = matching_problems(read_config(folder)["quantization_config"], packed_modules(candidate.index))
    if broken:
        raise InputError(f"{folder}/config.json cannot be used: {broken[0]}")
    missing = [n for n in job.structure.linears if f"{n}.weight" not in candidate]
    if missing:
        raise InputError(f"{folder} has no layer {missing[0]}; is {config.model} the model that it was made from?")
    problems = origin_problems(folder, job.index.folder, job.device)
    if problems:
        raise InputError(
            f"{folder} is not what was made from {config.model}, so a comparison would say nothing: {problems[0]} "
            f"({len(problems)} such); give its original"
        )
    rows = evaluation_rows(job, config.eval_data, config.eval_samples or MOST_REPORT_ROWS)
    check_tasks(job)
    context = RunContext(job, reporter, ranks=begin_ranks(others, job))
    evaluator = Evaluator(context, {"report": rows})
    with torch.no_grad():
        original = evaluator.evaluate(None, "original")["report"]
        quantized = evaluator.evaluate(folder, "quantized")["report"]
    found: EvaluationDocument = {
        "schema": "hawqtool.evaluation/1",
        "measure": "kl" if original.measure == "kl" else "embedding_error",
        "rows": {"source": rows.source, "fingerprint": rows.fingerprint, "count": len(rows.tokens)},
        "original": as_record(original),
        "quantized": as_record(quantized),
    }
    if config.tasks:
        found["tasks"] = judge_tasks(context, folder)
    return found
