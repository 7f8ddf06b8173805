"""Scores from the true Hessian: traces by random probes, top eigenvalues by Lanczos' method.

Traces are Hutchinson's: for v of independent signs, E vᵀHv = tr H. One v spans all layers at once, and a layer's
value is v_lᵀ(Hv)_l, whose expectation is tr H_ll because signs of different layers are independent: the cross terms
have mean zero and only add variance. The Hessian of cross-entropy is indefinite, so values may be negative; they are
reported as they are, never clamped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hawqtool.records import Unit, UnitScores
from hawqtool.sensitivity.curvature.hvp import Curvature, Inputs, Pass, Variables, Weights, products
from hawqtool.sensitivity.scores import mean_score

Progress = Callable[[str, int, int], None]


ErrorNorms = Mapping[str, Mapping[str, float]]
"""‖D‖² by linear and format label."""


def probe_traces(
    curvature: Curvature, variables: Variables, probes: int, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """vᵀHv of every variable, per output: ``[rows, probes]`` float64 whose mean estimates the trace per output.

    Args:
        curvature: Rows and their losses.
        variables: What H is taken with respect to.
        probes: Probes per row, independent of each other and of those of other rows.
        seed: Seed of the probes.
        progress: Called with the phase, the blocks done (both ways together) and those in all.
    """
    rows = len(curvature.rows)
    found: dict[str, Tensor] = {}

    def direction(p: Pass, name: str, like: Tensor) -> Tensor:
        return random_signs(like, f"{seed}/{p.row}/{p.tag}/{name}")

    def visit(p: Pass, name: str, v: Tensor, product: Tensor) -> None:
        values = found.setdefault(name, torch.zeros(rows, probes, dtype=torch.float64))
        values[p.row, p.tag] = float((v * product).sum(dtype=torch.float64)) / curvature.outputs

    passes = [Pass(row, probe) for row in range(rows) for probe in range(probes)]
    products(curvature, variables, passes, direction, visit, progress=partial(progress, "Hessian sweeps"))
    return found


def random_signs(like: Tensor, name: str) -> Tensor:
    """Independent signs, the same for the same name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator(like.device).manual_seed(seed)
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.mul_(2).sub_(1).to(like.dtype)


def unit_traces(units: Sequence[Unit], traces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values ``[rows, probes]`` of units from those of their linears, or of their inputs; zero where there is none."""
    shape = next(iter(traces.values())).shape
    zero = torch.zeros(shape, dtype=torch.float64)
    return {unit.name: sum((traces[m.name] for m in unit.members if m.name in traces), zero) for unit in units}


def trace_fields(values: Tensor, prefix: str = "") -> dict[str, float]:
    """Mean of ``[rows, probes]``, its standard error over rows, and the share of single probes below zero."""
    score = mean_score(values.mean(1))
    return {
        f"{prefix}trace": score.value,
        f"{prefix}trace_stderr": score.stderr,
        f"{prefix}negative_share": float((values < 0).double().mean()),
    }


def hawq_scores(units: Sequence[Unit], traces: Mapping[str, Tensor], norms: ErrorNorms) -> UnitScores:
    """HAWQ-V2's score (Dong et al. 2020, eq. 11): ½ Σ over a unit's linears of tr(H)/n · ‖D‖², H per output.

    Rows are independent and the probes of one row are not, so the standard error is that of the rows' means.

    Args:
        units: Units to score; those without rounding errors are left out.
        traces: vᵀHv per linear, ``[rows, probes]``, as `probe_traces` gives them.
        norms: ‖D‖² per linear and format label.
    """
    table = {}
    for unit in units:
        labels = norms.get(unit.members[0].name)
        if not labels:
            continue
        means = {m.name: traces[m.name].mean(1) / m.num_weights for m in unit.members}
        rows = {label: sum(0.5 * means[m.name] * norms[m.name][label] for m in unit.members) for label in labels}
        table[unit.name] = {label: mean_score(torch.as_tensor(values)) for label, values in rows.items()}
    return table


def curvature_fields(
    curvature: Curvature, units: Sequence[Unit], probes: int, seed: int, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Traces of all linears, and of every unit what is reported of its weights and its inputs.

    The traces with respect to inputs are HAWQ-V2's for activations (section 3.3): of the Hessian in an additive
    perturbation of the unit's input at every token of a row, per output.
    """
    traces = probe_traces(curvature, Weights(), probes, seed, progress)
    inputs = probe_traces(curvature, Inputs(), probes, seed, progress)
    by_unit, by_input = unit_traces(units, traces), unit_traces(units, inputs)
    return traces, {
        unit.name: trace_fields(by_unit[unit.name]) | trace_fields(by_input[unit.name], "input_") for unit in units
    }
