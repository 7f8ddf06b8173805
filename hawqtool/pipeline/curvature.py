"""Second derivatives of the loss for the sensitivity table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.progress import Reporter
from hawqtool.records import Score
from hawqtool.sensitivity.hessian import SUBSETS, curvature_fields, hawq_scores, top_eigenvalues
from hawqtool.sensitivity.measure import Measurement
from hawqtool.sensitivity.products import Curvature

Fields = dict[str, dict[str, float]]


def input_fisher_fields(measurement: Measurement) -> Fields:
    """Sensitivity of every unit's input, which the ordinary sweeps give."""
    return {
        unit: {"input_fisher": score.value, "input_fisher_stderr": score.stderr}
        for unit, score in measurement.input_fisher.items()
    }


def measure_curvature(
    job: Job,
    rows: Tensor,
    error_norms: Mapping[str, Mapping[str, float]],
    reporter: Reporter,
    saved: Saved = NOTHING_SAVED,
) -> tuple[dict[str, dict[str, dict[str, Score]]], Fields, dict[str, float | int | str]]:
    """Scores ``hawq`` and curvature by unit where that is wanted, eigenvalues likewise, and the settings of both.

    Args:
        job: The checkpoint; it computes in float32 here, whatever its own dtype.
        rows: Scoring rows.
        error_norms: ‖D‖² by linear and format label.
        reporter: Narration.
        saved: Keeps traces and eigenvalues when they are complete.
    """
    config = job.config
    curvature = Curvature(job.stream(dtype=torch.float32), rows, config.seed)
    scores: dict[str, dict[str, dict[str, Score]]] = {}
    fields: Fields = {unit.name: {} for unit in job.units}
    settings: dict[str, float | int | str] = {"hessian_labels": curvature.labels}
    if "hawq" in config.measured_extras:
        known = saved.load("traces")
        if known is None:
            known = curvature_fields(curvature, job.units, config.probes, config.seed, reporter.progress)
            saved.save("traces", known)
        traces, found = known
        scores["hawq"] = hawq_scores(job.units, traces, error_norms)
        fields = {unit: values | found[unit] for unit, values in fields.items()}
        settings["probes"] = config.probes
    if config.eigenvalues:
        found = saved.load("eigenvalues")
        if found is None:
            found = top_eigenvalues(curvature, job.units, config.eigenvalues, config.seed, reporter.progress)
            saved.save("eigenvalues", found)
        fields = {unit: values | found[unit] for unit, values in fields.items()}
        settings |= {"eigenvalue_iterations": config.eigenvalues, "eigenvalue_subsets": min(SUBSETS, len(rows))}
    return scores, fields, settings
