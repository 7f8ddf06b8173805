"""What is said of a batch: a row per job, the Pareto front of each model, JSON, CSV and figures."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hawqtool import __version__
from hawqtool.config import RunConfig
from hawqtool.pipeline.batch.jobs_file import SUMMARY_CSV, SUMMARY_JSON, BatchJob
from hawqtool.pipeline.run.files import write_json, write_text
from hawqtool.report.plan_comparison import shipped_of
from hawqtool.report.schema import Report

BATCH_SCHEMA = "hawqtool.batch/1"
GATE_FAILED = 3

Row = dict[str, Any]
_RESULTS = (
    *("model_name", "original_bytes", "quantized_bytes", "bpw_linears", "shipped", "measure", "divergence"),
    *("divergence_stderr", "uniform_divergence", "uniform_bytes", "perplexity", "measurement", "report_rows"),
)
_NOT_IN_CSV = ("gates",)


def empty_row(job: BatchJob) -> Row:
    """The row of a job before anything is known of it."""
    return {
        "name": job.name,
        "model": job.config.model,
        "target": target_text(job.config),
        "rounding": job.config.rounding,
        "status": "not run",
        "ran": False,
        "exit_code": None,
        "error": None,
        "seconds": None,
        "device": None,
        **dict.fromkeys(_RESULTS),
        "gates": [],
    }


def target_text(config: RunConfig) -> str:
    """A job's target for people."""
    if config.target_bpw is not None:
        return f"{config.target_bpw:g} bpw"
    if config.target_kl is not None:
        return f"divergence {config.target_kl:g}"
    if config.uniform_width is not None:
        return f"uniform {config.uniform_width} bits"
    if config.uniform_format is not None:
        return f"uniform {config.uniform_format.label}"
    return config.target_size or f"plan {Path(config.plan or '').name}"


def result(report: Report) -> Row:
    """What a row takes from a report; ``exit_code`` is 3 where a gate failed."""
    sizes = report["sizes"]
    failed = [gate for gate in report["gates"] if not gate["passed"]]
    origin = report["measurement"]
    return {
        "status": "gate failed" if failed else "done",
        "exit_code": GATE_FAILED if failed else 0,
        "error": "; ".join(f"{g['name']} {_number(g['limit'])}: found {_number(g['found'])}" for g in failed) or None,
        "model_name": report["model"],
        "original_bytes": sizes["original_bytes"],
        "quantized_bytes": sizes["quantized_bytes"],
        "bpw_linears": sizes["bpw_linears"],
        "shipped": report["shipped"],
        "measurement": origin["source"] if origin else "none",
        "gates": report["gates"],
        **_quality(report),
    }


def _quality(report: Report) -> Row:
    """What was measured; nothing where that was left out."""
    evaluation, rows = report["evaluation"], report["rows"]["report"]
    if evaluation is None or rows is None:
        return {}
    measure, chosen = evaluation["measure"], shipped_of(evaluation, report["shipped"])
    uniform = evaluation["uniform"]
    return {
        "measure": measure,
        "divergence": _finite(chosen[measure]),
        "divergence_stderr": _finite(chosen.get("kl_stderr", chosen.get("embedding_error_stderr"))),
        "uniform_divergence": _finite(uniform[measure]) if uniform else None,
        "uniform_bytes": uniform["total_bytes"] if uniform else None,
        "perplexity": _finite(chosen.get("perplexity")),
        "report_rows": rows["fingerprint"],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def batch_code(rows: Iterable[Row]) -> int:
    """Exit code of a batch: 3 where a gate failed, else the largest of its jobs."""
    codes = [row["exit_code"] or 0 for row in rows]
    return GATE_FAILED if GATE_FAILED in codes else max(codes, default=0)


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other one beats in bytes and in divergence, by bytes."""
    best, found = math.inf, []
    for row in sorted(rows, key=lambda row: (row["quantized_bytes"], row["divergence"])):
        if row["divergence"] < best:
            best = row["divergence"]
            found.append(row)
    return found


def summarize(rows: Sequence[Row], seconds: float, measured: int) -> dict[str, Any]:
    """The document of a batch (``hawqtool.batch/1``).

    Args:
        rows: One per job.
        seconds: Of this call.
        measured: Measurements that were made by this call.
    """
    models: dict[str, list[Row]] = {}
    for row in rows:
        if row["divergence"] is not None:
            models.setdefault(row["model"], []).append(row)
    files = _plot_names(models)
    return {
        "schema": BATCH_SCHEMA,
        "hawqtool_version": __version__,
        "exit_code": batch_code(rows),
        "seconds": seconds,
        "ran": sum(row["ran"] for row in rows),
        "measured": measured,
        "jobs": list(rows),
        "models": [
            {
                "model": model,
                "pareto": [row["name"] for row in front(of_model)],
                # Divergences on different rows are not to be compared closely.
                "same_rows": len({row["report_rows"] for row in of_model}) == 1,
                "plot": files[model],
            }
            for model, of_model in models.items()
        ],
    }


def _plot_names(models: Iterable[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for model in models:
        stem = "pareto-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.") or "model")
        taken, number, name = set(names.values()), 1, f"{stem}.png"
        while name in taken:
            number += 1
            name = f"{stem}-{number}.png"
        names[model] = name
    return names


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, summary.csv and a figure per model."""
    # Matplotlib is slow to load, and a dry run draws nothing.
    from hawqtool.report.page.batch_figures import pareto
    from hawqtool.report.page.drawing import save_png

    rows = summary["jobs"]
    for model in summary["models"]:
        of_model = [row for row in rows if row["model"] == model["model"] and row["divergence"] is not None]
        save_png(partial(pareto, _figure(of_model, model)), folder / model["plot"])
    write_json(folder / SUMMARY_JSON, summary)
    text = io.StringIO()
    writer = csv.DictWriter(text, [k for k in rows[0] if k not in _NOT_IN_CSV], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    write_text(folder / SUMMARY_CSV, text.getvalue())


def _cell(value: Any) -> Any:
    """A value as a spreadsheet takes it: a text that would be a formula there gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def _figure(rows: list[Row], model: dict[str, Any]) -> dict[str, Any]:
    uniform = {(r["uniform_bytes"], r["uniform_divergence"]) for r in rows if r["uniform_divergence"] is not None}
    return {
        "model": rows[0]["model_name"],
        "measure": rows[0]["measure"],
        "same_rows": model["same_rows"],
        "points": [
            {
                "name": row["name"],
                "bytes": row["quantized_bytes"],
                "value": row["divergence"],
                "stderr": row["divergence_stderr"],
                "passed": row["exit_code"] == 0,
                "best": row["name"] in model["pareto"],
            }
            for row in rows
        ],
        "uniform": sorted(uniform),
    }
