"""The measure stage: rows in, sensitivity table out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.data.tokens import fingerprint
from hawqtool.errors import NumericalError
from hawqtool.formats import UNQUANTIZED
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import sensitivity_document
from hawqtool.pipeline.run.identity import model_fingerprint
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.memory_budget import scoring_batch
from hawqtool.pipeline.run.menu import unquantized_bytes
from hawqtool.pipeline.stages.measurement_cache import MeasurementFolder, measurement_fingerprint
from hawqtool.pipeline.stages.refine import FormatRefiner, fitting_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.records import SWEEP_METRICS, MeasurementRows, Menu, Rows, Score, SensitivityTable, UnitScores
from hawqtool.report.documents import SensitivityDocument
from hawqtool.report.schema import MeasurementOrigin
from hawqtool.rounding.factor import SCARCE_TOKENS_PER_COLUMN
from hawqtool.rounding.learned.block import Schedule
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.sensitivity.curvature.hvp import Curvature
from hawqtool.sensitivity.curvature.lanczos import SUBSETS, top_eigenvalues
from hawqtool.sensitivity.curvature.trace import curvature_fields, hawq_scores
from hawqtool.sensitivity.forward import Progress
from hawqtool.sensitivity.measure import Measurement, SweepSettings, measure
from hawqtool.sensitivity.measured_kl import single_unit_divergence
from hawqtool.streaming.kept_roundings import ROUNDINGS, KeptRoundings

Fields = dict[str, dict[str, float]]


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

    @property
    def record(self) -> MeasurementOrigin:
        """What the report says of it."""
        return {"source": self.source, "fingerprint": self.fingerprint, "seconds": self.seconds}


def measured(
    context: RunContext,
    menu: Menu,
    sets: dict[str, Rows],
    metrics: Sequence[str] = SWEEP_METRICS,
) -> tuple[SensitivityDocument, Origin]:
    """The sensitivity document of a menu, taken from the folder of measurements or from the store where it is there.

    It has the extra metrics of the configuration, and those of ``metrics``, which come from one pair of sweeps.
    """
    known = context.saved.load("table")
    if known is None:
        document, origin = _shared(context, menu, sets, metrics)
        known = {"document": document, "origin": asdict(origin)}
        context.saved.save("table", known)
        context.saved.part(_STAGES).drop()
    for text in known["document"]["warnings"]:
        context.reporter.warn(text)
    return known["document"], Origin(**known["origin"])


def _compares_layerwise(job: Job) -> bool:
    return job.settings.proof == "layerwise" and not job.config.sensitivity_steps


def _shared(
    context: RunContext,
    menu: Menu,
    sets: dict[str, Rows],
    metrics: Sequence[str],
) -> tuple[SensitivityDocument, Origin]:
    """The document from the folder of measurements, if there is one; otherwise measured."""
    job, reporter = context.job, context.reporter
    if job.config.measurements is None:
        document = measure_job(context, menu, sets, metrics)
        return document, Origin("run", None, _seconds(document))
    key = measurement_fingerprint(job, wanted_formats(job, menu), sets, reporter, metrics)
    folder = MeasurementFolder(Path(job.config.measurements), reporter)
    document, found = folder.take(key, lambda: measure_job(context, menu, sets, metrics))
    if found:
        reporter.say(f"measurement {key[:12]} was taken from {folder.path}")
        document["model"] = job.source.name  # the same weights may have been measured under another name
    return document, Origin("shared" if found else "run", key, _seconds(document))


def _seconds(document: SensitivityDocument) -> float:
    """What measuring took."""
    return float(document["settings"]["seconds"])


def wanted_formats(job: Job, menu: Menu) -> Menu:
    """The menu, and pinned formats."""
    return {
        unit.name: tuple(dict.fromkeys((*menu[unit.name], *((job.pins[unit.name],) if unit.name in job.pins else ()))))
        for unit in job.units
    }


def measure_job(
    context: RunContext,
    menu: Menu,
    sets: dict[str, Rows],
    metrics: Sequence[str] = SWEEP_METRICS,
) -> SensitivityDocument:
    """Measure and return the sensitivity document; the store keeps finished stages."""
    start = time.perf_counter()
    job, stages = context.job, context.part(_STAGES)
    wanted, calibration = wanted_formats(job, menu), with_token_importance(context, sets["calibration"])
    calibration = replace(calibration, output_moments={})  # gigabytes that ranks would be sent for nothing
    keeps = job.device.type == "cuda" and _compares_layerwise(job)
    asked = wanted, calibration, sets["scoring"].tokens, tuple(metrics), keeps
    # Learning looks at all rows, and what is kept of a sweep is of all rows too.
    sharing = job if job.config.sensitivity_steps else context.shared(_swept, *asked)
    alone = sharing.ranks.size == 1
    leading = _Leading(stages.reporter.progress, stages.saved if alone else NOTHING_SAVED, context.roundings)
    found = _swept(sharing, *asked, leading)
    curvature = input_fisher_fields(found)
    settings: dict[str, float | int | str] = {}
    if "hawq" in job.config.measured_extras or job.config.eigenvalues:
        scores, fields, settings = measure_curvature(stages, sets["scoring"].tokens, found.error_norms)
        found.scores.update(scores)
        curvature = {unit: values | fields[unit] for unit, values in curvature.items()}
    if "kl" in job.config.measured_extras:
        found.scores["kl"] = single_unit_scores(stages.part("kl"), wanted, calibration, sets["scoring"])
    _add_unquantized(found, wanted)
    check_scores(found.scores, found.projections)
    table = SensitivityTable(
        scores=found.scores,
        rounding=job.config.rounding,
        model=job.source.name,
        model_fingerprint=model_fingerprint(job.index, context.reporter),
        rows={name: sets[name].fingerprint for name in ("calibration", "scoring")},
        settings=_settings(job, sets, found) | {"seconds": time.perf_counter() - start} | settings,
        symmetric=job.config.symmetric,
        projections=found.projections,
        curvature=curvature,
        warnings=score_warnings(found.scores),
    )
    return sensitivity_document(table, job.units, unquantized_bytes(job, menu))


def _add_unquantized(found: Measurement, wanted: Menu) -> None:
    """Add what units cost that stay as they are: nothing, in every metric and on every row."""
    free = [unit for unit, formats in wanted.items() if any(fmt.is_unquantized for fmt in formats)]
    rows = next((len(values) for labels in found.projections.values() for values in labels.values()), 0)
    for unit in free:
        for by_unit in found.scores.values():
            by_unit.setdefault(unit, {})[UNQUANTIZED] = Score(0.0, 0.0)
        if rows:
            found.projections.setdefault(unit, {})[UNQUANTIZED] = [0.0] * rows


class _Leading(NamedTuple):
    """What the leader does beside its share: it tells progress, saves, and keeps roundings."""

    progress: Progress = lambda *_: None
    saved: Saved = NOTHING_SAVED
    roundings: KeptRoundings | None = None


def _swept(
    job: Job,
    wanted: Menu,
    calibration: Rows,
    scoring: Tensor,
    metrics: Sequence[str],
    keeps: bool,
    leading: _Leading | None = None,
) -> Measurement:
    """What both sweeps give, on this rank's share of the rows; the leader has that of all."""
    leading = leading or _Leading(roundings=job.ranks.kept.setdefault(ROUNDINGS, KeptRoundings()))
    return measure(
        job.stream(),
        rows_of_measurement(job, _rounded_on(job, calibration), scoring),
        job.rounding(wanted, _refiner(job, calibration.tokens)),
        SweepSettings(job.config.seed, metrics=metrics, ranks=job.ranks, kept=leading.roundings if keeps else None),
        leading.progress,
        leading.saved,
    )


def rows_of_measurement(job: Job, calibration: Rows, scoring: Tensor) -> MeasurementRows:
    """Rows of a measurement with gradients, and how many go through the model together."""
    size = job.settings.batch_size
    return MeasurementRows(calibration, scoring, size, scoring_batch(job.device, size))


def _settings(job: Job, sets: dict[str, Rows], found: Measurement) -> dict[str, float | int | str]:
    """What the scores depend on beside rows, formats and rounding, for the record."""
    return {
        "num_samples": job.settings.num_samples,
        "seq_len": job.settings.seq_len,
        "scoring_samples": len(sets["scoring"].tokens),
        "rounding_samples": len(_rounded_on(job, sets["calibration"]).tokens),
        "shortened_rows": found.shortened_rows,
        "batch_size": job.settings.batch_size,
        "seed": job.config.seed,
        "per_row": job.task.per_row,
        "foem_beta": job.settings.method.feedback_beta,
        "token_importance": "gradient" if job.settings.uses_token_importance else "none",
        "sensitivity_steps": job.config.sensitivity_steps,
    }


def single_unit_scores(context: RunContext, menu: Menu, calibration: Rows, rows: Rows) -> UnitScores:
    """Metric ``kl``: the divergence on ``rows`` with one unit quantized, by unit and format label."""
    asked = menu, calibration, rows
    sharing = context.job if context.job.config.sensitivity_steps else context.shared(_single_units, *asked)
    return _single_units(sharing, *asked, context.reporter.progress, context.saved)


def _single_units(
    job: Job,
    menu: Menu,
    calibration: Rows,
    rows: Rows,
    progress: Progress = lambda *_: None,
    saved: Saved = NOTHING_SAVED,
) -> UnitScores:
    """The same, on this rank's share of the rows."""
    return single_unit_divergence(
        job.stream(),
        MeasurementRows(_rounded_on(job, calibration), rows.tokens, job.settings.batch_size),
        job.rounding(menu, _refiner(job, calibration.tokens)),
        progress,
        saved,
        job.ranks,
    )


def _rounded_on(job: Job, calibration: Rows) -> Rows:
    """Rows behind the roundings to score: without those on whose error their learning stops, as in the run itself."""
    return fitting_rows(calibration) if job.config.sensitivity_steps else measuring_rows(job, calibration)


def measuring_rows(job: Job, calibration: Rows) -> Rows:
    """Rows behind the roundings that are scored and compared: on a GPU half of them, where that is enough.

    They only have to tell formats apart, and passes of all rows through the model are half of the time of measuring.
    Sources take turns, so the first half of the rows has as much of each as the others.

    Args:
        job: The model and the settings.
        calibration: The calibration rows.
    """
    if job.device.type == "cpu" or job.row_format.values is not None:
        return calibration
    half, linears = len(calibration.tokens) // 2, job.structure.linears.values()
    # Fewer tokens than these are damped more, and an expert sees few of them all.
    wanted = SCARCE_TOKENS_PER_COLUMN * max(linear.in_features for linear in linears)
    if half * job.settings.seq_len < wanted or any(is_expert(linear.name) for linear in linears):
        return calibration
    tokens, importance = calibration.tokens[:half], calibration.importance
    return replace(
        calibration,
        tokens=tokens,
        fingerprint=fingerprint(tokens),
        importance=None if importance is None else {name: part[:half] for name, part in importance.items()},
        sources=calibration.sources[:half],
    )


def _refiner(job: Job, rows: Tensor) -> FormatRefiner | None:
    """What improves roundings before they are scored; None where that was not asked for."""
    schedule = Schedule(job.config.sensitivity_steps, job.config.seed)
    return FormatRefiner(job, job.stream(), rows, schedule) if schedule.steps else None


def input_fisher_fields(measurement: Measurement) -> Fields:
    """Sensitivity of every unit's input, which the ordinary sweeps give, and what rounding it costs by format label."""
    found = {
        unit: {"input_fisher": score.value, "input_fisher_stderr": score.stderr}
        for unit, score in measurement.input_fisher.items()
    }
    for unit, costs in measurement.input_costs.items():
        found[unit] |= {f"inputs {label}": score.value for label, score in costs.items()}
    return found


def measure_curvature(
    context: RunContext,
    rows: Tensor,
    error_norms: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, UnitScores], Fields, dict[str, float | int | str]]:
    """Scores ``hawq`` and curvature by unit where that is wanted, eigenvalues likewise, and the settings of both.

    Args:
        context: The run; its model computes in float32 here, whatever its own dtype, and its store keeps traces and
            eigenvalues when they are complete.
        rows: Scoring rows.
        error_norms: ‖D‖² by linear and format label.
    """
    job, config, saved, progress = context.job, context.job.config, context.saved, context.reporter.progress
    curvature = Curvature(job.stream(dtype=torch.float32), rows, config.seed)
    scores: dict[str, UnitScores] = {}
    fields: Fields = {unit.name: {} for unit in job.units}
    settings: dict[str, float | int | str] = {"hessian_labels": curvature.labels}
    if "hawq" in config.measured_extras:
        known = saved.load("traces")
        if known is None:
            known = curvature_fields(curvature, job.units, config.probes, config.seed, progress)
            saved.save("traces", known)
        traces, found = known
        scores["hawq"] = hawq_scores(job.units, traces, error_norms)
        fields = {unit: values | found[unit] for unit, values in fields.items()}
        settings["probes"] = config.probes
    if config.eigenvalues:
        found = saved.load("eigenvalues")
        if found is None:
            found = top_eigenvalues(curvature, job.units, config.eigenvalues, config.seed, progress)
            saved.save("eigenvalues", found)
        fields = {unit: values | found[unit] for unit, values in fields.items()}
        settings |= {"eigenvalue_iterations": config.eigenvalues, "eigenvalue_subsets": min(SUBSETS, len(rows))}
    return scores, fields, settings


def check_scores(scores: Mapping[str, UnitScores], projections: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Check that all scores are numbers, which plans are compared by.

    Raises:
        NumericalError: If one is NaN or infinite; names it.
    """
    advice = "gradients or activations overflow; give other --calibration rows, or one width (--bits 4), without scores"
    for metric, by_unit in scores.items():
        for unit, by_label in by_unit.items():
            for label, score in by_label.items():
                if not math.isfinite(score.value) or math.isinf(score.stderr):
                    raise NumericalError(f"the score {metric} of {unit} in {label} is not finite; {advice}")
    for unit, rows_by_label in projections.items():
        if not all(math.isfinite(value) for values in rows_by_label.values() for value in values):
            raise NumericalError(f"a gradient's projection of {unit} is not finite; {advice}")


def score_warnings(scores: Mapping[str, UnitScores]) -> tuple[str, ...]:
    """What the user should know of scores ``[metric][unit][format label]``: which of the true Hessian are negative.

    Such scores stay as they are, since the Hessian is indefinite; but a sum of them is no loss to be made small.
    """
    by_unit = scores.get("hawq", {})
    negative = [unit for unit, by_label in by_unit.items() if any(score.value < 0 for score in by_label.values())]
    if not negative:
        return ()
    return (
        f"{len(negative)} of {len(by_unit)} units have a negative hawq score (first {negative[0]}), as the mean trace "
        "of their Hessian is negative: allocation with --sensitivity hawq would give them the fewest bits; prefer "
        "hawq-ggn, whose trace is never negative, or measure with more --probes",
    )
