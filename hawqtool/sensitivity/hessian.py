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

from hawqtool.records import Score, Unit
from hawqtool.sensitivity.products import Curvature, Inputs, Pass, Variables, Weights, products
from hawqtool.sensitivity.scores import mean_score

Progress = Callable[[str, int, int], None]

SUBSETS = 4
"""Subsets of the rows behind the spread of a top eigenvalue; Q-BERT takes tenths of its data."""

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


def hawq_scores(units: Sequence[Unit], traces: Mapping[str, Tensor], norms: ErrorNorms) -> dict[str, dict[str, Score]]:
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


def top_eigenvalues(
    curvature: Curvature, units: Sequence[Unit], iterations: int, seed: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """The eigenvalue of largest magnitude of every unit's own block of the mean Hessian, with its sign.

    HAWQ (Dong et al. 2019) takes it over all rows, Q-BERT (Shen et al. 2020, eq. 2) its |mean| + std over subsets of
    them. Both papers use power iteration; Lanczos' method finds more with the same number of products, and tells
    apart values of like magnitude and opposite sign, between which power iteration ends anywhere.

    Args:
        curvature: Rows and their losses.
        units: Units to measure.
        iterations: Products per unit; every one walks the model from the unit's first block.
        seed: Seed of the first vectors.
        progress: Called with the phase, the products done (each of one block's units) and those in all.

    Returns:
        Per unit ``top_eigenvalue`` and ``residual``, ‖Hv - λv‖ / |λ|, and over the subsets ``eigenvalue_mean``,
        ``eigenvalue_std`` and ``qbert``.
    """
    structure = curvature.stream.structure
    starts: dict[int, list[Unit]] = {}
    for unit in units:
        starts.setdefault(min(m.block for m in unit.members), []).append(unit)
    rows = torch.arange(len(curvature.rows))
    groups = [rows.tolist(), *(part.tolist() for part in rows.tensor_split(min(SUBSETS, len(rows))))]
    table: dict[str, dict[str, float]] = {}
    hidden, done = list(curvature.first_hidden), 0
    for start in range(len(structure.blocks) + 1):
        if start in starts:
            found = _UnitRecurrences(curvature, starts[start], groups, seed)
            for _ in range(iterations):
                found.step(start, hidden)
                done += 1
                progress("eigenvalues", done, iterations * len(starts))
            table |= {unit.name: found.fields(unit) for unit in starts[start]}
        if start < len(structure.blocks):
            hidden = curvature.advance(start, hidden)
    return {unit.name: table[unit.name] for unit in units}


class Recurrence:
    """Lanczos' three-term recurrence of one symmetric matrix that is known by its products.

    It keeps two vectors. Without orthogonalisation against older ones, converged values come again as copies, which
    leaves the extreme ones as they are (Paige 1980).

    Args:
        vector: First vector, of unit norm, by variable.
    """

    def __init__(self, vector: dict[str, Tensor]) -> None:
        self.vector, self._previous = vector, {name: torch.zeros_like(part) for name, part in vector.items()}
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self.complete = False

    def add(self, product: Mapping[str, Tensor]) -> None:
        """Take the product with the current vector, and go on to the next."""
        if self.complete:  # the vectors span an invariant subspace: its values are known
            return
        diagonal = _inner(self.vector, product)
        before = self._beside[-1] if self._beside else 0.0
        rest = {n: p - diagonal * self.vector[n] - before * self._previous[n] for n, p in product.items()}
        norm = _inner(rest, rest) ** 0.5
        self._diagonal.append(diagonal)
        self._beside.append(norm)
        self.complete = norm <= torch.finfo(next(iter(rest.values())).dtype).eps * abs(diagonal)
        if not self.complete:
            self._previous, self.vector = self.vector, {name: part / norm for name, part in rest.items()}

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values in ascending order, the squares of their first components, and their residual norms."""
        beside = torch.tensor(self._beside, dtype=torch.float64)
        matrix = torch.tensor(self._diagonal, dtype=torch.float64).diag()
        matrix += beside[:-1].diag(1) + beside[:-1].diag(-1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors[0].square(), vectors[-1].abs() * beside[-1]


class _UnitRecurrences:
    """Recurrences of some units, one per group of rows, that one sweep carries on together.

    A pass is of one row along one unit's vector of one group, so its product holds no other unit's terms.
    """

    def __init__(self, curvature: Curvature, units: Sequence[Unit], groups: Sequence[Sequence[int]], seed: int) -> None:
        self.curvature, self.groups, self.seed = curvature, groups, seed
        self.keys = [(unit, group) for unit in units for group in range(len(groups))]
        self.members = [{m.name for m in unit.members} for unit, _ in self.keys]
        self.found: dict[int, Recurrence] = {}

    def step(self, start: int, hidden: Sequence[Tensor]) -> None:
        """One product of each."""
        sums: list[dict[str, Tensor]] = [{} for _ in self.keys]
        vectors: list[dict[str, Tensor]] = [{} for _ in self.keys]

        def direction(p: Pass, name: str, like: Tensor) -> Tensor | None:
            if name not in self.members[p.tag]:
                return None
            if p.tag in self.found:
                return self.found[p.tag].vector[name]
            size = sum(m.num_weights for m in self.keys[p.tag][0].members)
            return vectors[p.tag].setdefault(name, random_signs(like, f"{self.seed}/{name}") / size**0.5)

        def visit(p: Pass, name: str, v: Tensor, product: Tensor) -> None:
            group = self.groups[self.keys[p.tag][1]]
            held = sums[p.tag].setdefault(name, torch.zeros_like(product))
            held.add_(product, alpha=1 / (self.curvature.outputs * len(group)))

        passes = [Pass(row, tag) for tag, (_, group) in enumerate(self.keys) for row in self.groups[group]]
        products(self.curvature, Weights(), passes, direction, visit, start, hidden)
        for tag, product in enumerate(sums):
            self.found.setdefault(tag, Recurrence(vectors[tag])).add(product)

    def fields(self, unit: Unit) -> dict[str, float]:
        """What is reported of a unit."""
        tops = [_top(self.found[tag]) for tag, (owner, _) in enumerate(self.keys) if owner is unit]
        value, residual = tops[0]
        parts = torch.tensor([part for part, _ in tops[1:]], dtype=torch.float64)
        mean, std = float(parts.mean()), float(parts.std()) if len(parts) > 1 else float("nan")
        return {
            "top_eigenvalue": value,
            "residual": residual,
            "eigenvalue_mean": mean,
            "eigenvalue_std": std,
            "qbert": abs(mean) + std,
        }


def _top(recurrence: Recurrence) -> tuple[float, float]:
    """The value of largest magnitude, and its residual over that magnitude."""
    values, _, residuals = recurrence.values()
    place = int(values.abs().argmax())
    value = float(values[place])
    return value, float(residuals[place]) / abs(value) if value else 0.0


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((a[name] * b[name]).sum(dtype=torch.float64)) for name in a)


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
