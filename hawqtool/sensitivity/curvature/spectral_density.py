"""Spectrum of the Hessian over the weights of many layers at once, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.sensitivity.curvature.hvp import Curvature, Pass, Weights, products
from hawqtool.sensitivity.curvature.lanczos import Recurrence
from hawqtool.sensitivity.curvature.trace import random_signs

_CONVERGED, _SAME = 1e-2, 1e-5
"""Relative residual of a value that counts as found, and relative distance of values that are copies of one."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalue distribution of the mean Hessian of a row's loss per output.

    Args:
        nodes: ``[starts, iterations]`` float64, the Ritz values.
        weights: Their shares of the distribution, in all 1 per start.
        top: Converged eigenvalues, by falling magnitude, with their residual norms.
        num_weights: Size of the Hessian.
    """

    nodes: Tensor
    weights: Tensor
    top: tuple[tuple[float, float], ...]
    num_weights: int

    def moment(self, order: int) -> tuple[float, float]:
        """tr(H^order) / n with its standard error over starts; exact in expectation for orders below 2 · iterations."""
        values = (self.weights * self.nodes**order).sum(1)
        return float(values.mean()), float(values.std()) / len(values) ** 0.5

    def deviation(self, width: float = 0.01) -> float:
        """Standard deviation of the normal curves of `density`: ``width`` of the range of the nodes."""
        return width * float(self.nodes.max() - self.nodes.min()) or 1.0

    def density(self, points: int = 801, width: float = 0.01) -> tuple[Tensor, Tensor]:
        """Grid and density on it, nodes widened to normal curves with ``width`` of the range as deviation.

        Source: Lin, Saad and Yang 2016; Ghorbani et al. 2019, section 2.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        sigma = self.deviation(width)
        grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
        scaled = (grid[:, None] - self.nodes.flatten()) / sigma
        curves = (-0.5 * scaled.square()).exp() / (sigma * (2 * torch.pi) ** 0.5)
        return grid, curves @ self.weights.flatten() / len(self.nodes)


def spectrum(
    curvature: Curvature,
    names: Collection[str],
    iterations: int,
    starts: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Spectrum:
    """Quadrature of the spectrum over the weights of some linears.

    Four vectors of all these weights are held at a time.

    Args:
        curvature: Rows and their losses.
        names: Linears; the Hessian has the cross terms between them.
        iterations: Products per start.
        starts: Random first vectors, of independent signs.
        seed: Seed of them.
        progress: Called with the phase, the products done and those in all.
    """
    structure = curvature.stream.structure
    size = sum(linear.num_weights for name, linear in structure.linears.items() if name in names)
    found = []
    for start in range(starts):
        recurrence: Recurrence | None = None
        for done in range(iterations):
            recurrence = _product(curvature, names, recurrence, size, f"{seed}/{start}")
            progress("spectrum", start * iterations + done + 1, starts * iterations)
            if recurrence.complete:
                break
        assert recurrence is not None  # one iteration at least
        found.append(recurrence.values())
    width = max(len(values) for values, _, _ in found)
    nodes = torch.stack([_padded(values, width) for values, _, _ in found])
    weights = torch.stack([_padded(shares, width) for _, shares, _ in found])
    return Spectrum(nodes, weights, _converged(*found[0]), size)


def _product(
    curvature: Curvature, names: Collection[str], recurrence: Recurrence | None, size: int, seed: str
) -> Recurrence:
    first: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}

    def direction(_p: Pass, name: str, like: Tensor) -> Tensor | None:
        if name not in names:
            return None
        if recurrence is not None:
            return recurrence.vector[name]
        if name not in first:
            first[name] = random_signs(like, f"{seed}/{name}") / size**0.5
        return first[name]

    def visit(_p: Pass, name: str, _v: Tensor, product: Tensor) -> None:
        share = 1 / (curvature.outputs * len(curvature.rows))
        total.setdefault(name, torch.zeros_like(product)).add_(product, alpha=share)

    products(curvature, Weights(), [Pass(row, 0) for row in range(len(curvature.parts))], direction, visit)
    recurrence = recurrence or Recurrence(first)
    recurrence.add(total)
    return recurrence


def _padded(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)))


def _converged(values: Tensor, _shares: Tensor, residuals: Tensor) -> tuple[tuple[float, float], ...]:
    """Converged values without the copies that a recurrence of two vectors makes of them."""
    kept: list[tuple[float, float]] = []
    for place in values.abs().argsort(descending=True).tolist():
        value, residual = float(values[place]), float(residuals[place])
        if residual <= _CONVERGED * abs(value) and all(abs(value - k) > _SAME * abs(k) for k, _ in kept):
            kept.append((value, residual))
    return tuple(kept)
