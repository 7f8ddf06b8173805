"""The measure stage: rows in, sensitivity table out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.model.index import fingerprint
from hawqtool.pipeline.artifacts import check_writable, sensitivity_document, write_json
from hawqtool.pipeline.curvature import input_fisher_fields, measure_curvature
from hawqtool.pipeline.job import Job, prepare
from hawqtool.pipeline.measurements import MeasurementFolder, check_measurements, measurement_fingerprint
from hawqtool.pipeline.planning import WIDE_MENU, format_menu, score_warnings, stored_bytes, widths
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.rows import gather_rows
from hawqtool.records import Rows, Score, SensitivityTable
from hawqtool.sensitivity.measure import measure
from hawqtool.sensitivity.single_unit import single_unit_divergence


def unquantized_bytes(job: Job, menu: dict[str, tuple[QuantFormat, ...]]) -> int:
    """Bytes of the output files beside packed codes and scales; the longest header is assumed."""
    widest = {unit.name: max((*menu[unit.name], *job.pins.values())) for unit in job.units}
    return job.layout(widest).total_bytes - stored_bytes(job.units, widest)


@dataclass(frozen=True)
class Origin:
    """Where the scores of a run come from.

    Args:
        source: ``run`` (measured now), ``shared`` (taken from the folder of measurements) or ``file``.
        fingerprint: Name in the folder of measurements; None where there is none.
        seconds: What measuring took, whenever that was; None where a file does not say.
    """

    source: str
    fingerprint: str | None = None
    seconds: float | None = None


def measured(
    job: Job, menu: dict[str, tuple[QuantFormat, ...]], sets: dict[str, Rows], reporter: Reporter
) -> tuple[dict[str, Any], Origin]:
    """The sensitivity document of a menu, taken from the folder of measurements where it is there."""
    if job.config.measurements is None:
        document = measure_job(job, menu, sets, reporter)
        return document, Origin("run", None, document["settings"]["seconds"])
    key = measurement_fingerprint(job, wanted_formats(job, menu), sets, reporter)
    folder = MeasurementFolder(Path(job.config.measurements), reporter)
    document, found = folder.take(key, lambda: measure_job(job, menu, sets, reporter))
    if found:
        reporter.say(f"measurement {key[:12]} was taken from {folder.path}")
        for text in document["warnings"]:
            reporter.warn(text)
        document["model"] = job.source.name  # the same weights may have been measured under another name
    return document, Origin("shared" if found else "run", key, document["settings"]["seconds"])


def wanted_formats(job: Job, menu: dict[str, tuple[QuantFormat, ...]]) -> dict[str, tuple[QuantFormat, ...]]:
    """The menu, and pinned formats."""
    return {
        unit.name: tuple(dict.fromkeys((*menu[unit.name], *((job.pins[unit.name],) if unit.name in job.pins else ()))))
        for unit in job.units
    }


def measure_job(
    job: Job, menu: dict[str, tuple[QuantFormat, ...]], sets: dict[str, Rows], reporter: Reporter
) -> dict[str, Any]:
    """Measure and return the sensitivity document."""
    start = time.perf_counter()
    wanted = wanted_formats(job, menu)
    found = measure(
        job.stream(),
        sets["calibration"].tokens,
        sets["scoring"].tokens,
        wanted,
        job.method,
        job.stored_dtypes,
        job.rows_per_slice,
        job.config.seed,
        reporter.progress,
    )
    curvature = input_fisher_fields(found)
    settings: dict[str, float | int | str] = {}
    if "hawq" in job.config.measured_extras or job.config.eigenvalues:
        scores, fields, settings = measure_curvature(job, sets["scoring"].tokens, found.error_norms, reporter)
        found.scores.update(scores)
        curvature = {unit: values | fields[unit] for unit, values in curvature.items()}
    if "kl" in job.config.measured_extras:
        found.scores["kl"] = single_unit_scores(job, wanted, sets["calibration"], sets["scoring"], reporter)
    warnings = score_warnings(found.scores)
    for text in warnings:
        reporter.warn(text)
    table = SensitivityTable(
        scores=found.scores,
        rounding=job.config.rounding,
        model=job.source.name,
        model_fingerprint=fingerprint(job.index),
        rows={name: sets[name].fingerprint for name in ("calibration", "scoring")},
        settings={
            "num_samples": job.num_samples,
            "seq_len": job.seq_len,
            "scoring_samples": len(sets["scoring"].tokens),
            "rows_per_slice": job.rows_per_slice,
            "seed": job.config.seed,
            "per_row": job.task.per_row,
            "foem_beta": job.method.feedback_beta,
            "seconds": time.perf_counter() - start,
            **settings,
        },
        symmetric=job.config.symmetric,
        projections=found.projections,
        curvature=curvature,
        warnings=warnings,
    )
    return sensitivity_document(table, job.units, unquantized_bytes(job, menu))


def single_unit_scores(
    job: Job, menu: Mapping[str, Sequence[QuantFormat]], calibration: Rows, rows: Rows, reporter: Reporter
) -> dict[str, dict[str, Score]]:
    """Metric ``kl``: the divergence on ``rows`` with one unit quantized, by unit and format label."""
    return single_unit_divergence(
        job.stream(),
        calibration.tokens,
        rows.tokens,
        menu,
        job.method,
        job.stored_dtypes,
        job.rows_per_slice,
        reporter.progress,
    )


def run_measure(config: RunConfig, output: Path, reporter: Reporter) -> dict[str, Any]:
    """``hawqtool measure``: write sensitivity.json for the widths asked for (default 2,3,4,8)."""
    check_writable(output)
    check_measurements(config)
    job = prepare(config, reporter)
    menu = format_menu(job.units, config.bits or WIDE_MENU, config.group_size, config.symmetric)
    sets = gather_rows(job, reporter)
    document, _ = measured(job, menu, sets, reporter)
    write_json(output, document)
    return document


def job_menu(job: Job, budget: int | None) -> dict[str, tuple[QuantFormat, ...]]:
    """Formats of each unit under the configuration's widths and budget."""
    config = job.config
    return format_menu(job.units, widths(config, job.units, budget), config.group_size, config.symmetric)
