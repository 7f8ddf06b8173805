"""The measure stage: rows in, sensitivity table out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.formats import QuantFormat
from hawqtool.model.index import fingerprint
from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.pipeline.artifacts import check_writable, sensitivity_document, write_json
from hawqtool.pipeline.curvature import input_fisher_fields, measure_curvature
from hawqtool.pipeline.identity import check_unchanged, run_identity, stamps
from hawqtool.pipeline.job import Job, prepare
from hawqtool.pipeline.measurements import MeasurementFolder, check_measurements, measurement_fingerprint
from hawqtool.pipeline.planning import WIDE_MENU, format_menu, score_warnings, stored_bytes, widths
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.refining import FormatRefiner
from hawqtool.pipeline.rows import gather_rows
from hawqtool.pipeline.run_folder import RunFolder
from hawqtool.pipeline.weighing import weighed
from hawqtool.records import SCORE_METRICS, SWEEP_METRICS, Rows, Score, SensitivityTable
from hawqtool.rounding.refine import Schedule
from hawqtool.sensitivity.measure import Measurement, measure
from hawqtool.sensitivity.single_unit import single_unit_divergence


def unquantized_bytes(job: Job, menu: dict[str, tuple[QuantFormat, ...]]) -> int:
    """Bytes of the output files beside packed codes and scales; the longest header is assumed."""
    widest = {unit.name: max((*menu[unit.name], *job.pins.values())) for unit in job.units}
    return job.layout(widest).total_bytes - stored_bytes(job.units, widest)


_STAGES = "measure"
"""Part of what is saved that a finished measurement replaces."""


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
    job: Job,
    menu: dict[str, tuple[QuantFormat, ...]],
    sets: dict[str, Rows],
    reporter: Reporter,
    saved: Saved = NOTHING_SAVED,
    metrics: Sequence[str] = SWEEP_METRICS,
) -> tuple[dict[str, Any], Origin]:
    """The sensitivity document of a menu, taken from the folder of measurements or from ``saved`` where it is there.

    It has the extra metrics of the configuration, and those of ``metrics``, which come from one pair of sweeps.
    """
    known = saved.load("table")
    if known is None:
        document, origin = _shared(job, menu, sets, reporter, saved, metrics)
        known = {"document": document, "origin": asdict(origin)}
        saved.save("table", known)
        saved.part(_STAGES).drop()
    for text in known["document"]["warnings"]:
        reporter.warn(text)
    return known["document"], Origin(**known["origin"])


def _shared(
    job: Job,
    menu: dict[str, tuple[QuantFormat, ...]],
    sets: dict[str, Rows],
    reporter: Reporter,
    saved: Saved,
    metrics: Sequence[str],
) -> tuple[dict[str, Any], Origin]:
    """The document from the folder of measurements, if there is one; otherwise measured."""
    if job.config.measurements is None:
        document = measure_job(job, menu, sets, reporter, saved, metrics)
        return document, Origin("run", None, document["settings"]["seconds"])
    key = measurement_fingerprint(job, wanted_formats(job, menu), sets, reporter, metrics)
    folder = MeasurementFolder(Path(job.config.measurements), reporter)
    document, found = folder.take(key, lambda: measure_job(job, menu, sets, reporter, saved, metrics))
    if found:
        reporter.say(f"measurement {key[:12]} was taken from {folder.path}")
        document["model"] = job.source.name  # the same weights may have been measured under another name
    return document, Origin("shared" if found else "run", key, document["settings"]["seconds"])


def wanted_formats(job: Job, menu: dict[str, tuple[QuantFormat, ...]]) -> dict[str, tuple[QuantFormat, ...]]:
    """The menu, and pinned formats."""
    return {
        unit.name: tuple(dict.fromkeys((*menu[unit.name], *((job.pins[unit.name],) if unit.name in job.pins else ()))))
        for unit in job.units
    }


def measure_job(
    job: Job,
    menu: dict[str, tuple[QuantFormat, ...]],
    sets: dict[str, Rows],
    reporter: Reporter,
    saved: Saved = NOTHING_SAVED,
    metrics: Sequence[str] = SWEEP_METRICS,
) -> dict[str, Any]:
    """Measure and return the sensitivity document; ``saved`` keeps finished stages."""
    start = time.perf_counter()
    stages = saved.part(_STAGES)
    wanted, calibration = wanted_formats(job, menu), weighed(job, sets["calibration"], reporter, saved)
    found = measure(
        job.stream(),
        calibration,
        sets["scoring"].tokens,
        wanted,
        job.method,
        job.stored_dtypes,
        job.rows_per_slice,
        job.config.seed,
        reporter.progress,
        stages,
        refiner=_refiner(job, calibration.tokens),
        metrics=metrics,
    )
    curvature = input_fisher_fields(found)
    settings: dict[str, float | int | str] = {}
    if "hawq" in job.config.measured_extras or job.config.eigenvalues:
        scores, fields, settings = measure_curvature(job, sets["scoring"].tokens, found.error_norms, reporter, stages)
        found.scores.update(scores)
        curvature = {unit: values | fields[unit] for unit, values in curvature.items()}
    if "kl" in job.config.measured_extras:
        rows = calibration, sets["scoring"]
        found.scores["kl"] = single_unit_scores(job, wanted, *rows, reporter, stages.part("kl"))
    table = SensitivityTable(
        scores=found.scores,
        rounding=job.config.rounding,
        model=job.source.name,
        model_fingerprint=fingerprint(job.index),
        rows={name: sets[name].fingerprint for name in ("calibration", "scoring")},
        settings=_settings(job, sets, found) | {"seconds": time.perf_counter() - start} | settings,
        symmetric=job.config.symmetric,
        projections=found.projections,
        curvature=curvature,
        warnings=score_warnings(found.scores),
    )
    return sensitivity_document(table, job.units, unquantized_bytes(job, menu))


def _settings(job: Job, sets: dict[str, Rows], found: Measurement) -> dict[str, float | int | str]:
    """What the scores depend on beside rows, formats and rounding, for the record."""
    return {
        "num_samples": job.num_samples,
        "seq_len": job.seq_len,
        "scoring_samples": len(sets["scoring"].tokens),
        "shortened_rows": found.shortened_rows,
        "rows_per_slice": job.rows_per_slice,
        "seed": job.config.seed,
        "per_row": job.task.per_row,
        "foem_beta": job.method.feedback_beta,
        "token_weights": "gradient" if job.weighs_tokens else "none",
        "sensitivity_steps": job.config.sensitivity_steps,
    }


def single_unit_scores(
    job: Job,
    menu: Mapping[str, Sequence[QuantFormat]],
    calibration: Rows,
    rows: Rows,
    reporter: Reporter,
    saved: Saved = NOTHING_SAVED,
) -> dict[str, dict[str, Score]]:
    """Metric ``kl``: the divergence on ``rows`` with one unit quantized, by unit and format label."""
    return single_unit_divergence(
        job.stream(),
        calibration,
        rows.tokens,
        menu,
        job.method,
        job.stored_dtypes,
        job.rows_per_slice,
        reporter.progress,
        saved,
        _refiner(job, calibration.tokens),
    )


def _refiner(job: Job, rows: Tensor) -> FormatRefiner | None:
    """What improves roundings before they are scored; None where that was not asked for."""
    schedule = Schedule(job.config.sensitivity_steps, job.config.seed)
    return FormatRefiner(job, job.stream(), rows, schedule) if schedule.steps else None


def run_measure(config: RunConfig, output: Path, reporter: Reporter) -> dict[str, Any]:
    """``hawqtool measure``: write sensitivity.json for the widths asked for (default 2,3,4,8).

    A metric of the common sweeps that the configuration names is measured alone.

    Raises:
        UsageError: If it names a saved file instead of a metric.
        HawqError: With a note where finished work is kept (see `RunFolder`).
    """
    if config.sensitivity not in ("auto", *SCORE_METRICS):
        raise UsageError(f"measure makes scores anew; --sensitivity names a metric there, found {config.sensitivity}")
    check_writable(output)
    check_measurements(config)
    with RunFolder(output.absolute()) as run:
        job = prepare(config, reporter, states=run.path)
        before = stamps(job.index)
        run.begin(run_identity(job), config.resume, reporter)
        menu = format_menu(job.units, config.bits or WIDE_MENU, config)
        sets = gather_rows(job, reporter, run.saved)
        run.check_rows({name: rows.fingerprint for name, rows in sets.items()})
        alone = config.sensitivity in SWEEP_METRICS
        document, _ = measured(job, menu, sets, reporter, run.saved, (config.sensitivity,) if alone else SWEEP_METRICS)
        check_unchanged(job.index, before)
        write_json(output, document)
        run.finish()
    return document


def job_menu(job: Job, budget: int | None) -> dict[str, tuple[QuantFormat, ...]]:
    """Formats of each unit under the configuration's widths and budget."""
    config = job.config
    return format_menu(job.units, widths(config, job.units, budget), config)
