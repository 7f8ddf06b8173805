"""From a checkpoint and a template to a mixed GGUF file: measure, allocate, round, write, evaluate."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.config import RunConfig
from hawqtool.errors import NumericalError, UsageError, disk_errors
from hawqtool.export.manifest import file_hash
from hawqtool.pipeline.gguf.imatrix import input_power, write_imatrix
from hawqtool.pipeline.gguf.planner import announce, check_feasible, make_gguf_planner, stored_budget, types_of
from hawqtool.pipeline.gguf.record import SCHEMA, matrix_records, record_path
from hawqtool.pipeline.gguf.tensors import GgufJob, prepare_gguf
from hawqtool.pipeline.gguf.trials import GgufTrial, GgufTrials
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import write_json
from hawqtool.pipeline.run.folder import RunFolder
from hawqtool.pipeline.run.identity import check_unchanged, record_content, run_identity, stamps
from hawqtool.pipeline.run.out_of_memory import remember_batch_size, resumed_batch_size
from hawqtool.pipeline.stages.rows import gather_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.report.documents import GgufDocument
from hawqtool.runtime.reporter import Reporter
from hawqtool.runtime.stage_timer import Stopwatch, Timings

_ALL = "all"
"""The one stage of which times are kept."""


def run_gguf(config: RunConfig, reporter: Reporter) -> GgufDocument:
    """``hawqtool quantize --to gguf``: write a file for llama.cpp, of exactly the size that was planned.

    Args:
        config: The run's configuration, with a template.
        reporter: Narration and progress.

    Returns:
        The record, which lies beside the file too (`hawqtool.gguf/1`).

    Raises:
        HawqError: With a note where finished work is kept (see `RunFolder`); else nothing is left behind.
    """
    start, output = time.perf_counter(), output_file(config)
    with RunFolder(output, reporter) as run:
        if record_path(output).exists() and not run.unfinished:
            raise UsageError(f"{record_path(output)} exists; remove it or choose another name")
        gguf, warnings = prepare_gguf(config, reporter, run.path), list[str]()
        if run.unfinished and not config.restart:
            job, warnings = resumed_batch_size(gguf.job, run)
            gguf = replace(gguf, job=job)
        before = stamps(gguf.job.index)
        budget = stored_budget(gguf)
        if budget is not None:
            check_feasible(gguf, budget)
        announce(gguf, budget, reporter)
        record_content(gguf.job.index, before, reporter)
        run.begin(run_identity(gguf.job), config.restart)
        remember_batch_size(gguf.job, warnings, run)
        timings = Timings(run.saved)
        earlier = timings.get(_ALL, 0.0)
        with Stopwatch(timings, _ALL):
            document, made = _made(RunContext(gguf.job, reporter, run.saved), gguf, run, budget)
        check_unchanged(gguf.job.index, before)
        document["seconds"] = earlier + time.perf_counter() - start
        if config.tensor_types is not None:
            write_type_list(Path(config.tensor_types), types_of(made.plan))
        _put_in_place(made.path, output, document)
        run.finish()
    return document


def output_file(config: RunConfig) -> Path:
    """The file to write.

    Raises:
        UsageError: If there is none, it exists, or its folder does not.
    """
    if config.output is None or not config.output.endswith(".gguf"):
        raise UsageError(f"--to gguf writes one file, found --output {config.output}; name it, such as out.gguf")
    output = Path(config.output).resolve()
    if not output.parent.is_dir():
        raise UsageError(f"the parent folder of {config.output} does not exist; create it first")
    if output.exists():
        raise UsageError(f"{output} exists; remove it or choose another name")
    return output


def write_type_list(path: Path, types: Mapping[str, BlockType]) -> None:
    """Write types by tensor as llama-quantize takes them with ``--tensor-type-file``: a line ``pattern=type`` each."""
    lines = [f"^{re.escape(name)}$={kind.name.lower()}\n" for name, kind in types.items()]
    with disk_errors(path):
        path.write_text("".join(lines), encoding="utf-8")


def _made(context: RunContext, gguf: GgufJob, run: RunFolder, budget: int | None) -> tuple[GgufDocument, GgufTrial]:
    """The record, and the complete file inside the run's folder."""
    sets = gather_rows(context)
    run.check_rows({name: rows.fingerprint for name, rows in sets.items()})
    if gguf.job.config.imatrix is not None:
        rows = sets["calibration"]
        write_imatrix(Path(gguf.job.config.imatrix), gguf, input_power(gguf, rows), rows)
    calibration = with_token_importance(context, sets["calibration"]) if "calibration" in sets else None
    planner = make_gguf_planner(context, gguf, sets, calibration)
    trials, bound = GgufTrials(context, planner, sets, calibration, run.plans), gguf.job.config.target_kl
    search, made = (None, trials.run(planner.plan(budget))) if bound is None else trials.smallest(bound)
    expected = gguf.layout(types_of(made.plan)).total_bytes
    if made.path.stat().st_size != expected:
        raise NumericalError(f"{made.path} has {made.path.stat().st_size} bytes; {expected} were planned; run again")
    plan, found = made.plan, made.findings
    document: GgufDocument = {
        "schema": SCHEMA,
        "model": gguf.job.source.name,
        "template": gguf.template.path.name,
        "output": Path(cast(str, gguf.job.config.output)).name,
        "bytes": expected,
        "sha256": file_hash(made.path),
        "bpw": plan.bpw,
        "num_weights": plan.num_weights,
        "metric": planner.metric,
        "predicted_loss": plan.predicted_loss,
        "types": {name: kind.name for name, kind in types_of(plan).items()},
        "kept": dict(gguf.kept),
        "matrices": matrix_records(gguf.places, found.weight_errors),
        "output_error": found.output_errors,
        "rounded_to_nearest": found.plain,
        "quality": trials.quality(made),
        "search": search,
        "seconds": 0.0,
    }
    return document, made


def _put_in_place(made: Path, output: Path, document: GgufDocument) -> None:
    """Give file and record their names, the record first: a file that is there has one."""
    record = record_path(output)
    try:
        with disk_errors(output):
            write_json(record, cast(dict[str, Any], document))
            made.rename(output)
    finally:
        if not output.exists():
            record.unlink(missing_ok=True)
