"""The Hessian's spectrum for ``hawqtool inspect --spectrum``."""

from __future__ import annotations

from typing import Any

import torch

from hawqtool.config import RunConfig
from hawqtool.pipeline.job import prepare
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.rows import gather_rows
from hawqtool.sensitivity.products import Curvature
from hawqtool.sensitivity.spectrum import spectrum

ITERATIONS, STARTS = 30, 4


def run_spectrum(config: RunConfig, reporter: Reporter) -> dict[str, Any]:
    """Spectrum of the Hessian over all linears that would be quantized, on the scoring rows.

    Returns:
        ``eigenvalues`` (value and residual norm, by falling magnitude), the quadrature's ``nodes`` and ``weights``,
        the smoothed ``density`` on ``grid``, and the means of the eigenvalues and of their squares with standard
        errors over starts.
    """
    job = prepare(config, reporter, writes=False)
    rows = gather_rows(job, reporter)["scoring"]
    curvature = Curvature(job.stream(dtype=torch.float32), rows.tokens, config.seed)
    names = {m.name for unit in job.units for m in unit.members}
    found = spectrum(curvature, names, ITERATIONS, STARTS, config.seed, reporter.progress)
    grid, density = found.density()
    return {
        "labels": curvature.labels,
        "rows": len(rows.tokens),
        "rows_fingerprint": rows.fingerprint,
        "num_weights": found.num_weights,
        "iterations": ITERATIONS,
        "starts": STARTS,
        "eigenvalues": [list(pair) for pair in found.top],
        "mean": list(found.moment(1)),
        "mean_square": list(found.moment(2)),
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
        "grid": grid.tolist(),
        "density": density.tolist(),
    }
