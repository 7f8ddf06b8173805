"""The Hessian's spectrum and the loss along the rounding error, for ``hawqtool inspect --spectrum``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.pipeline.report import check_plots
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.rows import calibration_rows, check_calibration
from hawqtool.records import Rows
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.runtime.reporter import Reporter
from hawqtool.sensitivity.curvature.hvp import Curvature
from hawqtool.sensitivity.curvature.loss_along_error import loss_along
from hawqtool.sensitivity.curvature.spectral_density import Spectrum, spectrum
from hawqtool.sensitivity.scores import mean_score

_TOKENS_PER_PASS = 512


@dataclass(frozen=True)
class SpectrumSettings:
    """How much is measured.

    Args:
        rows: Rows that the loss is a mean over.
        iterations: Lanczos iterations per start, each one Hessian-vector product.
        starts: Random first vectors.
        width: Bits of the rounding error along which the loss is measured.
        plots: Folder for PNG files, created if need be; None for none.
    """

    rows: int
    iterations: int
    starts: int
    width: int
    plots: Path | None


def run_spectrum(config: RunConfig, settings: SpectrumSettings, reporter: Reporter) -> dict[str, Any]:
    """Spectrum of the Hessian over all linears that would be quantized, and the loss along their rounding error.

    Returns:
        ``eigenvalues`` (value and residual norm, by falling magnitude), the quadrature's ``nodes`` and ``weights``,
        the smoothed ``density`` on ``grid``, the means of the eigenvalues and of their squares with standard errors
        over starts, and ``loss``: measured divergence at ``scales`` with its prediction.

    Raises:
        InputError: If a source holds too little.
        UsageError: If the folder for the figures cannot be made.
    """
    if settings.plots is not None:
        check_plots(settings.plots)
    start = time.perf_counter()
    context = RunContext(prepare(config, reporter, writes=False), reporter)
    check_calibration(context.job)
    rounded = {} if config.rounding == "rtn" else {"calibration": context.job.settings.num_samples}
    counts = {"scoring": settings.rows} | rounded
    sets = calibration_rows(context, counts)
    # First what takes seconds: its problems show before minutes go into the spectrum.
    loss = _loss(context, sets, settings.width)
    found = _spectrum(context, sets["scoring"], settings) | {"loss": loss}
    found["seconds"] = time.perf_counter() - start
    if settings.plots is not None:
        found["plots"] = [str(path) for path in _draw(found, settings.plots)]
    return found


def _spectrum(context: RunContext, rows: Rows, settings: SpectrumSettings) -> dict[str, Any]:
    job, seed = context.job, context.job.config.seed
    together = max(1, _TOKENS_PER_PASS // job.settings.seq_len)
    curvature = Curvature(job.stream(dtype=torch.float32), rows.tokens, seed, together)
    names = {m.name for unit in job.units for m in unit.members}
    found = spectrum(curvature, names, settings.iterations, settings.starts, seed, context.reporter.progress)
    grid, density = found.density()
    return {
        "labels": curvature.labels,
        "rows": len(rows.tokens),
        "rows_source": rows.source,
        "rows_fingerprint": rows.fingerprint,
        "num_weights": found.num_weights,
        "iterations": settings.iterations,
        "starts": settings.starts,
        "eigenvalues": [list(pair) for pair in found.top],
        "mean": list(found.moment(1)),
        "mean_square": list(found.moment(2)),
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
        "grid": grid.tolist(),
        "density": density.tolist(),
        "single": _single(found),
    }


def _single(found: Spectrum) -> float:
    """Height of one eigenvalue of all in the smoothed density."""
    return 1 / (found.num_weights * found.deviation() * math.sqrt(2 * math.pi))


def _loss(context: RunContext, sets: dict[str, Rows], width: int) -> dict[str, Any]:
    job = context.job
    formats = uniform_formats(job.units, width, job.config.base_group_size)
    found = loss_along(
        job.stream(dtype=torch.float32),
        sets["calibration"].tokens if "calibration" in sets else None,
        sets["scoring"].tokens,
        RoundingSpec.of_plan(job.settings.method, formats, job.stored_dtypes),
        job.settings.batch_size,
        context.reporter.progress,
    )
    scores = [mean_score(rows) for rows in found.divergence]
    quadratic = mean_score(found.quadratic)
    return {
        "measure": "kl" if job.task.logits else "embedding_error",
        "formats": sorted({fmt.label for fmt in formats.values()}),
        "rounding": job.config.rounding,
        "scales": list(found.scales),
        "divergence": [score.value for score in scores],
        "stderr": [score.stderr for score in scores],
        "quadratic": quadratic.value,
        "quadratic_stderr": quadratic.stderr,
        "breaks_at": found.breaks_at,
    }


def _draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figures."""
    from hawqtool.report.page.drawing import save_png
    from hawqtool.report.page.spectrum_figures import FIGURES

    loss = found["loss"]
    measure = "KL in nats per output" if loss["measure"] == "kl" else "relative squared error of the embedding"
    labelled = loss | {"measure": measure, "format": f"{' and '.join(loss['formats'])}, {loss['rounding']}"}
    folder.mkdir(exist_ok=True)
    written = []
    for name, function in FIGURES.items():
        written.append(folder / f"{name}.png")
        save_png(partial(function, labelled if name == "loss" else found), written[-1])
    return written
