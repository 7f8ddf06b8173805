"""Slow, obvious float64 references for rounding: plain loops over columns, written from the formulas alone.

Everything here works on a Hessian and weights whose columns are already in visiting order (see `visiting_order`).
Every rounding reference returns ``(codes, values)``: ``values`` are what was rounded, in units of the scale, so
that a test can tell a wrong code from one that lay on a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]
Rounded = tuple[Matrix, Matrix]


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every weight, ``[out, in]``, and the range of codes; symmetric grids have zeros of 0."""

    step: Matrix
    zero: Matrix
    lowest: int
    highest: int

    def round(self, values: Matrix, column: int) -> tuple[Matrix, Matrix]:
        """Codes of one column of values, and the values in units of the scale."""
        scaled = values / self.step[:, column] + self.zero[:, column]
        return np.clip(np.rint(scaled), self.lowest, self.highest), scaled

    def value(self, codes: Matrix, column: int) -> Matrix:
        """Weights that one column of codes stands for."""
        return (codes - self.zero[:, column]) * self.step[:, column]


def damped(gram: Matrix, fraction: float) -> Matrix:
    """H + λI with λ a fraction of the mean diagonal."""
    return gram + fraction * np.mean(np.diag(gram)) * np.eye(len(gram))


def visiting_order(gram: Matrix) -> NDArray[np.int64]:
    """Columns by descending diagonal; equal ones keep their order."""
    return np.argsort(-np.diag(gram), kind="stable")


def upper_factor(hessian: Matrix) -> Matrix:
    """U upper triangular with H⁻¹ = UᵀU, by the explicit inverse."""
    inverse = np.linalg.inv(hessian)
    lower: Matrix = np.linalg.cholesky(inverse)
    return lower.T


def right_factor(hessian: Matrix) -> Matrix:
    """R upper triangular with H = R Rᵀ, by one Cholesky factorisation of the flipped matrix."""
    lower: Matrix = np.linalg.cholesky(hessian[::-1, ::-1])
    return lower[::-1, ::-1]


def plain(weight: Matrix, grid: Grid) -> Rounded:
    """Nearest codes."""
    scaled = weight / grid.step + grid.zero
    return np.clip(np.rint(scaled), grid.lowest, grid.highest), scaled


def gptq(weight: Matrix, grid: Grid, hessian: Matrix) -> Rounded:
    """GPTQ in U form: the weights still to come are changed in place."""
    upper = upper_factor(hessian)
    current, codes, values = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j], values[:, j] = grid.round(current[:, j], j)
        error = (current[:, j] - grid.value(codes[:, j], j)) / upper[j, j]
        for k in range(j, weight.shape[1]):
            current[:, k] -= error * upper[j, k]
    return codes, values


def gptq_targets(weight: Matrix, grid: Grid, hessian: Matrix, codes: Matrix) -> Matrix:
    """What GPTQ would round in each column, in units of the scale, had it made the given codes before."""
    upper = upper_factor(hessian)
    current, values = weight.copy(), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        values[:, j] = current[:, j] / grid.step[:, j]
        error = (current[:, j] - codes[:, j] * grid.step[:, j]) / upper[j, j]
        for k in range(j, weight.shape[1]):
            current[:, k] -= error * upper[j, k]
    return values


def gptq_feedback(weight: Matrix, grid: Grid, hessian: Matrix) -> Rounded:
    """GPTQ in feedback form: each target is the original weight plus a sum over the errors made so far."""
    right = right_factor(hessian)
    codes, values, made = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        target = weight[:, j].copy()
        for i in range(j):
            target += made[:, i] * right[i, j] / right[j, j]
        codes[:, j], values[:, j] = grid.round(target, j)
        made[:, j] = weight[:, j] - grid.value(codes[:, j], j)
    return codes, values


def foem(weight: Matrix, grid: Grid, hessian: Matrix, beta: float) -> Rounded:
    """FOEM's exact rule, with the drift kept apart from the weights."""
    upper = upper_factor(hessian)
    drift, codes, values = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j], values[:, j] = grid.round(weight[:, j] + (1 - beta) * drift[:, j], j)
        quantized = grid.value(codes[:, j], j)
        error = (weight[:, j] + (1 - beta) ** 2 * drift[:, j] - quantized) / upper[j, j]
        for k in range(j + 1, weight.shape[1]):
            drift[:, k] -= error * upper[j, k]
    return codes, values


def foem_feedback(weight: Matrix, grid: Grid, hessian: Matrix, beta: float) -> Rounded:
    """FOEM in feedback form, β < 1: M = diag(U) + (1-β)² triu(U, 1), fed back through M⁻¹."""
    upper = upper_factor(hessian)
    right = np.linalg.inv(np.diag(np.diag(upper)) + (1 - beta) ** 2 * np.triu(upper, 1))
    codes, values, made = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        feedback = np.zeros(len(weight))
        for i in range(j):
            feedback += made[:, i] * right[i, j] / right[j, j]
        codes[:, j], values[:, j] = grid.round(weight[:, j] + feedback / (1 - beta), j)
        made[:, j] = weight[:, j] - grid.value(codes[:, j], j)
    return codes, values


def foem_in_place(weight: Matrix, grid: Grid, hessian: Matrix, beta: float) -> Rounded:
    """FOEM as its authors' code in GPTQModel has it: each column is pulled once, just before it is rounded."""
    upper = upper_factor(hessian)
    current, codes, values = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        current[:, j] -= beta * (current[:, j] - weight[:, j])
        codes[:, j], values[:, j] = grid.round(current[:, j], j)
        pulled = beta * (current[:, j] - weight[:, j])
        error = (current[:, j] - grid.value(codes[:, j], j) - pulled) / upper[j, j]
        for k in range(j + 1, weight.shape[1]):
            current[:, k] -= error * upper[j, k]
    return codes, values


def foem_paper(weight: Matrix, grid: Grid, hessian: Matrix, beta: float, width: int = 128) -> Rounded:
    """FOEM as it is published (arXiv 2507.11017, Algorithm 1): a step pulls the rest of its block, then adds."""
    upper = upper_factor(hessian)
    current, codes, values = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    columns = weight.shape[1]
    for j in range(columns):
        end = min((j // width + 1) * width, columns)
        codes[:, j], values[:, j] = grid.round(current[:, j], j)
        error = current[:, j] - grid.value(codes[:, j], j) - beta * (current[:, j] - weight[:, j])
        for k in range(j + 1, end):
            current[:, k] -= beta * (current[:, k] - weight[:, k])
        for k in range(j + 1, columns):
            current[:, k] -= error / upper[j, j] * upper[j, k]
    return codes, values


def gptaq(weight: Matrix, grid: Grid, hessian: Matrix, drift: Matrix, alpha: float) -> Rounded:
    """GPTAQ (arXiv 2504.02692, Algorithm 1): each column also adds itself, as it is before rounding, times P."""
    upper = upper_factor(hessian)
    transfer = alpha * np.triu(drift @ upper.T, 1) @ upper
    current, codes, values = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j], values[:, j] = grid.round(current[:, j], j)
        error = (current[:, j] - grid.value(codes[:, j], j)) / upper[j, j]
        for k in range(j + 1, weight.shape[1]):
            current[:, k] += current[:, j] * transfer[j, k] - error * upper[j, k]
    return codes, values


def full_shift(weight: Matrix, drift: Matrix, hessian: Matrix) -> Matrix:
    """W Δ H⁻¹ by the explicit inverse."""
    shift: Matrix = weight @ drift @ np.linalg.inv(hessian)
    return shift


def refitted_scale(
    codes: Matrix, scales: Matrix, target: Matrix, gram: Matrix, row: int, group: int, dtype: torch.dtype
) -> float:
    """Best scale of one row and group with everything else of the row fixed, cast; by the derivative's zero."""
    width = codes.shape[1] // scales.shape[1]
    difference = codes[row] * np.repeat(scales[row], width) - target[row]
    direction = np.zeros(codes.shape[1])
    direction[group * width : (group + 1) * width] = codes[row, group * width : (group + 1) * width]
    step = (direction @ gram @ difference) / (direction @ gram @ direction)
    return stored(float(scales[row, group]) - float(step), dtype)


def objective(difference: Matrix, gram: Matrix) -> float:
    """Trace of D H Dᵀ."""
    return float(np.trace(difference @ gram @ difference.T))


def stored(value: float, dtype: torch.dtype) -> float:
    """A number after a round trip through the stored dtype."""
    return float(torch.tensor(value, dtype=torch.float32).to(dtype).double())


def scale_error(weights: Matrix, importance: Matrix, scale: float, bits: int) -> float:
    """Sum of c (w - s q)² over one group."""
    if scale == 0:
        return float("inf")
    codes = np.clip(np.rint(weights / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.sum(importance * (weights - scale * codes) ** 2))


def scale_bounds(weights: Matrix, bits: int) -> tuple[float, float]:
    """Smallest and largest magnitude of the candidates of one group."""
    peak = float(np.abs(weights).max())
    return 0.3 * peak / (2 ** (bits - 1) - 0.5), peak / (2 ** (bits - 1) - 1)


def exhaustive_scale(
    weights: Matrix, importance: Matrix, bits: int, dtype: torch.dtype, signs: Sequence[float], steps: int
) -> tuple[float, float]:
    """``(scale, error)`` of the best of ``steps`` equally spaced candidates per sign."""
    low, high = scale_bounds(weights, bits)
    best = (0.0, float("inf"))
    for index in range(steps):
        for sign in signs:
            scale = stored(sign * (low + (high - low) * (1 - index / (steps - 1))), dtype)
            error = scale_error(weights, importance, scale, bits)
            if error < best[1]:
                best = (scale, error)
    return best


def two_stage_scale(
    weights: Matrix, importance: Matrix, bits: int, dtype: torch.dtype, signs: Sequence[float], coarse: int, fine: int
) -> tuple[float, float]:
    """``(scale, error)`` of the best of ``coarse`` candidates per sign, then of ``fine`` on either side of it."""
    low, high = scale_bounds(weights, bits)
    best_place, best_scale, best_error = 0.0, 0.0, float("inf")
    places = [1 - index / (coarse - 1) for index in range(coarse)]
    for place in places:
        for sign in signs:
            scale = stored(sign * (low + (high - low) * place), dtype)
            error = scale_error(weights, importance, scale, bits)
            if error < best_error:
                best_place, best_scale, best_error = place, scale, error
    centre, sign = best_place, float(np.sign(best_scale))
    for index in range(-fine, fine + 1):
        place = min(max(centre + index / (coarse - 1) / (fine + 1), 0.0), 1.0)
        scale = stored(sign * (low + (high - low) * place), dtype)
        error = scale_error(weights, importance, scale, bits)
        if error < best_error:
            best_scale, best_error = scale, error
    return best_scale, best_error


def asymmetric_error(weights: Matrix, importance: Matrix, scale: float, zero: int, bits: int) -> float:
    """Sum of c (w - s (q - z))² over one group."""
    if scale == 0:
        return float("inf")
    codes = np.clip(np.rint(weights / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.sum(importance * (weights - scale * (codes - zero)) ** 2))


def asymmetric_range(weights: Matrix, bits: int) -> tuple[float, int]:
    """Width of the range from min(w, 0) to max(w, 0), and the zero point that puts it on the codes."""
    lowest, highest = min(float(weights.min()), 0.0), max(float(weights.max()), 0.0)
    return highest - lowest, -(2 ** (bits - 1)) - round(lowest / (highest - lowest) * (2**bits - 1))


def exhaustive_grid(weights: Matrix, importance: Matrix, bits: int, dtype: torch.dtype, steps: int) -> float:
    """Error of the best of ``steps`` equally spaced scales and all zero points."""
    span, _ = asymmetric_range(weights, bits)
    best = float("inf")
    for index in range(steps):
        scale = stored(span / (2**bits - 1) * (0.3 + 0.7 * (1 - index / (steps - 1))), dtype)
        for zero in range(-(2 ** (bits - 1)), 2 ** (bits - 1)):
            best = min(best, asymmetric_error(weights, importance, scale, zero, bits))
    return best


def two_stage_grid(
    weights: Matrix, importance: Matrix, bits: int, dtype: torch.dtype, coarse: int, fine: int
) -> tuple[float, int, float]:
    """``(scale, zero, error)`` of the best of ``coarse`` scales, then ``fine`` on either side, zero points ±1."""
    span, start = asymmetric_range(weights, bits)
    zeros = [min(max(start + o, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for o in (0, -1, 1)]
    best_place, best = 0.0, (0.0, 0, float("inf"))

    def attempt(place: float) -> None:
        nonlocal best_place, best
        scale = stored(span / (2**bits - 1) * (0.3 + 0.7 * place), dtype)
        for zero in zeros:
            error = asymmetric_error(weights, importance, scale, zero, bits)
            if error < best[2]:
                best_place, best = place, (scale, zero, error)

    for index in range(coarse):
        attempt(1 - index / (coarse - 1))
    centre = best_place
    for index in range(-fine, fine + 1):
        attempt(min(max(centre + index / (coarse - 1) / (fine + 1), 0.0), 1.0))
    return best
