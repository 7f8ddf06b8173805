"""Metrics against the measured truth: what was predicted for each unit and width, and what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import rankdata

from hawqtool.formats import parse_label
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.stages.measure import measure_curvature, single_unit_scores
from hawqtool.records import SWEEP_METRICS, MeasurementRows, UnitScores
from hawqtool.runtime.reporter import Reporter
from hawqtool.sensitivity.measure import Measurement, SweepSettings, measure
from hawqtool.sensitivity.measured_kl import pairs_of_scores, scores_of_pairs
from study.cost import Meter
from study.setting import Findings, Setting

RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)
_QUARTILES = (25, 50, 75)


def _sweeps(setting: Setting, metrics: Sequence[str], reporter: Reporter) -> Measurement:
    job = setting.job
    return measure(
        job.stream(),
        MeasurementRows(setting.calibration, setting.scoring.tokens, job.settings.batch_size),
        job.rounding(setting.menu),
        SweepSettings(job.config.seed, metrics=metrics),
        reporter.progress,
    )


def _kl(setting: Setting, _: Measurement, reporter: Reporter) -> UnitScores:
    return single_unit_scores(RunContext(setting.job, reporter), setting.menu, setting.calibration, setting.scoring)


def _hawq(setting: Setting, swept: Measurement, reporter: Reporter) -> UnitScores:
    job = replace(setting.job, config=setting.job.config.model_copy(update={"extra_metrics": ("hawq",)}))
    return measure_curvature(RunContext(job, reporter), setting.scoring.tokens, swept.error_norms)[0]["hawq"]


EXTRAS: dict[str, Callable[[Setting, Measurement, Reporter], UnitScores]] = {"hawq": _hawq, "kl": _kl}
"""How each metric that has sweeps of its own is measured; errors' norms come from the ordinary sweeps."""


def measure_scores(setting: Setting, metrics: Sequence[str], findings: Findings, reporter: Reporter) -> None:
    """Measure what is missing, on the scoring rows, with its cost."""
    scores, cost = findings.data["scores"], findings.data["cost"]
    missing = [metric for metric in metrics if metric not in scores]
    if not missing:
        return
    swept, common = None, [metric for metric in missing if metric in SWEEP_METRICS]
    if "hawq" in missing or common:
        with Meter(setting.job.device) as meter:
            swept = _sweeps(setting, common, reporter)
        cost[" + ".join(common) or "errors"] = meter.record
        scores |= {metric: pairs_of_scores(found) for metric, found in swept.scores.items()}
        findings.save()
    for metric in (metric for metric in missing if metric in EXTRAS):
        with Meter(setting.job.device) as meter:
            found = EXTRAS[metric](setting, swept or Measurement({}, {}, {}, {}, 0), reporter)
        cost[metric] = meter.record
        scores[metric] = pairs_of_scores(found)
        findings.save()


def measure_truth(setting: Setting, findings: Findings, reporter: Reporter) -> None:
    """Divergence with one unit quantized, on the held-out rows."""
    if findings.data["truth"] is None:
        found = single_unit_scores(
            RunContext(setting.job, reporter), setting.menu, setting.calibration, setting.heldout
        )
        findings.data["truth"] = pairs_of_scores(found)
        findings.save()


def compare(findings: Findings, seed: int) -> None:
    """Agreement of every metric with the truth by width: rank correlation and calibration."""
    truth = scores_of_pairs(findings.data["truth"])
    agreement: dict[str, dict[str, Any]] = {}
    for metric, document in findings.data["scores"].items():
        for bits, (predicted, measured) in by_width(scores_of_pairs(document), truth).items():
            agreement.setdefault(metric, {})[str(bits)] = {
                "units": len(predicted),
                **rank_agreement(predicted, measured, seed),
                **calibration(predicted, measured),
            }
    findings.data["agreement"] = agreement
    findings.save()


def by_width(scores: UnitScores, truth: UnitScores) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Predicted and measured values of all units, by width."""
    pairs: dict[int, list[tuple[float, float]]] = {}
    for unit, found in truth.items():
        for label, score in found.items():
            pairs.setdefault(parse_label(label).bits, []).append((scores[unit][label].value, score.value))
    return {bits: (np.array(found)[:, 0], np.array(found)[:, 1]) for bits, found in sorted(pairs.items())}


def rank_agreement(first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, float | list[float] | None]:
    """Spearman's coefficient of ``[n]`` values, ties sharing their mean rank, and a 95 % interval by resampling units.

    Returns:
        ``spearman`` and ``interval``; None where values are all equal.
    """
    chosen = np.random.default_rng(seed).integers(0, len(first), (RESAMPLES, len(first)))
    samples = _spearman(first[chosen], second[chosen])
    samples = samples[np.isfinite(samples)]
    value = float(_spearman(first[None], second[None])[0])
    interval = [float(v) for v in np.percentile(samples, _INTERVAL)] if len(samples) else None
    return {"spearman": value if math.isfinite(value) else None, "interval": interval}


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row by row, ``[samples, n]``; NaN where a row is constant."""
    centred = [(ranks := rankdata(values, axis=1)) - ranks.mean(1, keepdims=True) for values in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        products = (centred[0] * centred[1]).sum(1)
        return np.asarray(products / np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1)))


def calibration(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Predicted over measured: geometric mean and quartiles where both are positive, and how many are not."""
    usable = (predicted > 0) & (measured > 0)
    if not usable.any():
        return {"ratio": None, "ratio_quartiles": None, "not_positive": len(predicted)}
    logs = np.log(predicted[usable] / measured[usable])
    return {
        "ratio": float(np.exp(logs.mean())),
        "ratio_quartiles": [float(v) for v in np.exp(np.percentile(logs, _QUARTILES))],
        "not_positive": int((~usable).sum()),
    }


def predicted_sums(scores: Mapping[str, UnitScores], labels: Mapping[str, str]) -> dict[str, float | None]:
    """What each metric predicts for a plan, the sum over units; None where it has no score of a format."""
    sums: dict[str, float | None] = {}
    for metric, found in scores.items():
        values = [found[unit][label].value if label in found[unit] else None for unit, label in labels.items()]
        known = [value for value in values if value is not None]
        sums[metric] = math.fsum(known) if len(known) == len(values) else None
    return sums
