"""Largest eigenvalues of each unit's block of the Hessian, by Lanczos' method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hawqtool.records import Unit
from hawqtool.sensitivity.curvature.hvp import Curvature, Pass, Prefix, Weights, products
from hawqtool.sensitivity.curvature.trace import Progress, random_signs

SUBSETS = 4
"""Subsets of the rows behind the spread of a top eigenvalue; Q-BERT takes tenths of its data."""


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
        products(self.curvature, Weights(), passes, direction, visit, Prefix(start, hidden))
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
