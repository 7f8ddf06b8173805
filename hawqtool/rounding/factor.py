"""Damping, column order and triangular factor of a Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.rounding.kernels.tensor_cores import SPAN, stacked_parts

SCARCE_TOKENS_PER_COLUMN = 8
DAMPING, SCARCE_DAMPING = 0.05, 0.2
_RETRY_FACTOR, _MAX_RETRIES = 4.0, 6
_CONDITION = 1 << 16
"""Bound of the condition up to which float32 serves: times its rounding, 2^-24, it is less than 1 %."""

_DIRECT = {"cpu": 288, "cuda": 1024}
"""Columns that are factored at once."""

_DIRECT_OF_MANY = 128
"""Columns that are factored at once where many matrices are: a GPU's solver of many takes them column by column."""


@dataclass(frozen=True)
class Factor:
    """The factor that compensation needs.

    Args:
        upper: ``[in, in]`` float32, U with (PᵀHP + λI)⁻¹ = UᵀU in visiting order.
        pivots: ``[in]`` float32, R_jj = 1 / U_jj of the same order.
        order: ``[in]`` int64, columns in the order in which they are visited.
        diagonal: ``[in]`` float32, damped diagonal in natural order.
        damping: λ as a fraction of the mean diagonal.
        retries: How often λ had to be raised before the Cholesky factorisation held.
        dead_inputs: Columns whose input was always zero; they are rounded plainly.
        num_tokens: Tokens behind the Gram matrix.
    """

    upper: Tensor
    pivots: Tensor
    order: Tensor
    diagonal: Tensor
    damping: float
    retries: int
    dead_inputs: int
    num_tokens: int
    _steps: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _steps_of_parts: dict[int, list[tuple[Tensor, Tensor]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    recorded: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Recorded loops over it, or how often one would have served, by their form."""

    def steps(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """U by blocks of columns: its block on the diagonal, contiguous, and what lies right of that.

        Output feedback runs the loop 32 times over one factor, on so few rows that cutting this anew would take longer
        than the arithmetic.
        """
        if size not in self._steps:
            parts = ((first, min(first + size, len(self.order))) for first in range(0, len(self.order), size))
            self._steps[size] = [
                (self.upper[first:last, first:last].contiguous(), self.upper[first:last, last:])
                for first, last in parts
            ]
        return self._steps[size]

    def steps_of_parts(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """`steps` for updates by parts on tensor cores: blocks on the diagonal, and stacked parts of U.

        What a block reaches is the rest of its span of columns; for the last one of a span these are the parts of the
        whole span over all that lies behind it (see `LaterColumns`). Of a width of 14,336 they take 1.2 GB.
        """
        if size not in self._steps_of_parts:
            width, steps = len(self.order), []
            for start in range(0, width, SPAN):
                stop = min(start + SPAN, width)
                parts = stacked_parts(self.upper[start:stop, start:], size)
                for first in range(start, stop, size):
                    last = min(first + size, stop)
                    reach = slice(last - start, None if last == stop else stop - start)
                    lines = slice(0 if last == stop else 3 * (first - start), 3 * (last - start))
                    steps.append((self.upper[first:last, first:last].contiguous(), parts[lines, reach]))
            self._steps_of_parts[size] = steps
        return self._steps_of_parts[size]

    @cached_property
    def places(self) -> Tensor:
        """When each column is visited, ``[in]`` int64 in natural order."""
        return self.order.argsort()

    @property
    def conditional(self) -> Tensor:
        """R_jj², ``[in]`` float32 in natural order: what an error costs after later columns did what they can.

        It is the least of tr(D (H + λI) Dᵀ) over what the columns still to come may do about a unit error in column j;
        with d_j the error of column j when it is rounded, compensated rounding loses Σ_j R_jj² d_j² in all.
        """
        values = torch.empty_like(self.pivots)
        values[self.order] = self.pivots.square()
        return values


def default_damping(num_tokens: int, in_features: int) -> float:
    """0.05 of the mean diagonal, 0.2 below 8 tokens per column, where feedback would overfit."""
    return DAMPING if num_tokens >= SCARCE_TOKENS_PER_COLUMN * in_features else SCARCE_DAMPING


def factorize(
    gram: Tensor, num_tokens: int, damping: float | None = None, act_order: bool = True, name: str = "this layer"
) -> Factor:
    """Factor H + λI, columns in order of descending H_jj (act-order with static groups).

    The matrix with both axes flipped has the Cholesky factor L; U is L⁻¹, flipped back (GPTQ, Frantar et al. 2023, uses
    the same U from three factorisations). The arithmetic is float64, or float32 on a CPU, where that takes half the
    time, if the damping bounds the condition (see `_CONDITION`).

    Args:
        gram: ``[in, in]`` float32 or float64, mean of x xᵀ over tokens.
        num_tokens: Tokens behind it.
        damping: λ over mean diagonal; None applies `default_damping`.
        act_order: Sort columns by their diagonal; False keeps the natural order.
        name: Layer to name in errors.

    Raises:
        NumericalError: If the matrix is not finite, or no damping makes it positive definite.
    """
    diagonal = gram.diagonal().double()
    # A sum is not finite where one of its terms is not. Fetched together: each alone would stall a GPU.
    total, dead, mean = torch.stack([gram.sum(dtype=torch.float64), (diagonal == 0).sum(), diagonal.mean()]).tolist()
    if not math.isfinite(total):
        raise NumericalError(f"the Gram matrix holds NaN or Inf: the inputs of {name} overflow")
    mean = mean or 1.0
    fraction = default_damping(num_tokens, gram.shape[0]) if damping is None else damping
    order = torch.argsort(diagonal, descending=True, stable=True)
    if not act_order:
        order = torch.arange(len(order), device=gram.device)
    backwards = order.flip(0)
    for retries in range(_MAX_RETRIES + 1):  # noqa: B007 (read after the loop)
        work = gram.index_select(0, backwards).index_select(1, backwards).to(_working_dtype(gram, fraction))
        work.diagonal().copy_(diagonal[backwards] + fraction * mean)
        inverse, failed = inverse_cholesky(work)
        if not bool(failed):
            break
        fraction = max(fraction, 1e-4) * _RETRY_FACTOR
    else:
        raise NumericalError(
            f"{name}: Cholesky failed even with damping {fraction / _RETRY_FACTOR:.3g} of the mean diagonal"
        )
    del work  # of wide layers each of these takes gigabytes
    upper = inverse.float().flip(0, 1)
    return Factor(
        upper=upper,
        pivots=upper.diagonal().reciprocal(),
        order=order,
        diagonal=(diagonal + fraction * mean).float(),
        damping=fraction,
        retries=retries,
        dead_inputs=int(dead),
        num_tokens=num_tokens,
    )


def factorize_alike(
    grams: Sequence[Tensor], num_tokens: Sequence[int], damping: float | None, names: Sequence[str]
) -> list[Factor]:
    """Factor matrices of one size; a GPU, for which one is a chain of small steps, takes all of them together.

    Args:
        grams: ``[in, in]`` float32 or float64 each.
        num_tokens: Tokens behind each.
        damping: As for `factorize`.
        names: Layer of each to name in errors.

    Raises:
        NumericalError: As `factorize`.
    """
    if len(grams) > 1 and grams[0].is_cuda:
        return factorize_stacked(grams, num_tokens, damping, names)
    named = zip(grams, num_tokens, names, strict=True)
    return [factorize(gram, count, damping, name=name) for gram, count, name in named]


def factorize_stacked(
    grams: Sequence[Tensor], num_tokens: Sequence[int], damping: float | None, names: Sequence[str]
) -> list[Factor]:
    """Factor matrices of one size by products of stacks of them, in float64; arguments are those of `factorize_alike`.

    What cannot be factored at the damping given is left to `factorize`, which raises it.
    """
    gram, width = torch.stack(list(grams)), len(grams[0])
    diagonal = gram.diagonal(dim1=1, dim2=2).double()
    found = torch.stack([gram.sum((1, 2), dtype=torch.float64), (diagonal == 0).sum(1), diagonal.mean(1)], 1).tolist()
    fractions = [default_damping(count, width) if damping is None else damping for count in num_tokens]
    added = [fraction * (mean or 1.0) for fraction, (_, _, mean) in zip(fractions, found, strict=True)]
    damped = diagonal + torch.tensor(added, dtype=torch.float64, device=gram.device)[:, None]
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    backwards = order.flip(1)
    rows, columns = (backwards.unsqueeze(axis).expand_as(gram) for axis in (2, 1))
    work = gram.gather(1, rows).gather(2, columns).double()
    del gram  # of wide layers each of these takes gigabytes
    work.diagonal(dim1=1, dim2=2).copy_(damped.gather(1, backwards))
    inverse = torch.zeros_like(work)
    failures: list[Tensor] = []
    _factor_stack_into(work, inverse, failures)
    failed = torch.stack(failures).any(0).tolist()
    upper = inverse.float().flip(1, 2)
    pivots, damped = upper.diagonal(dim1=1, dim2=2).reciprocal(), damped.float()
    factors = []
    for i, (total, dead, _) in enumerate(found):
        if failed[i] or not math.isfinite(total):
            factors.append(factorize(grams[i], num_tokens[i], damping, name=names[i]))
        else:
            counts = fractions[i], 0, int(dead), num_tokens[i]
            factors.append(Factor(upper[i], pivots[i], order[i], damped[i], *counts))
    return factors


def _working_dtype(gram: Tensor, fraction: float) -> torch.dtype:
    """float32 on a CPU where no eigenvalue can be so small that its roundings matter, else float64."""
    if gram.device.type == "cpu" and len(gram) <= _CONDITION * fraction:
        return torch.float32  # no eigenvalue exceeds the trace, none is below the damping
    return torch.float64


def inverse_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of the Cholesky factor L of a matrix, ``[n, n]``, and whether there is none, a bool ``[]``.

    Only the lower triangle is read, and overwritten. Halves are factored by themselves, so that nearly all the work is
    products of matrices: on two cores it took half the time of LAPACK's factor and inverse.
    """
    inverse = torch.zeros_like(matrix)
    failures: list[Tensor] = []
    _factor_into(matrix, inverse, failures)
    return inverse, torch.stack(failures).any()


def _factor_stack_into(matrices: Tensor, inverses: Tensor, failures: list[Tensor]) -> None:
    """`_factor_into` for ``[count, n, n]``; failures are ``[count]`` each."""
    size = matrices.shape[1]
    if size <= _DIRECT_OF_MANY:
        lower, info = torch.linalg.cholesky_ex(matrices)
        identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
        inverses.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        failures.append(info != 0)
        return
    half = size // 2
    first, last = inverses[:, :half, :half], inverses[:, half:, half:]
    _factor_stack_into(matrices[:, :half, :half], first, failures)
    corner = matrices[:, half:, :half] @ first.mT
    rest = torch.baddbmm(matrices[:, half:, half:], corner, corner.mT, alpha=-1)
    _factor_stack_into(rest, last, failures)
    inverses[:, half:, :half] = (last @ corner.neg_()) @ first


def _factor_into(matrix: Tensor, inverse: Tensor, failures: list[Tensor]) -> None:
    """Write L⁻¹ on and below the diagonal of a matrix of zeros."""
    size = len(matrix)
    if size <= _DIRECT[matrix.device.type]:
        lower, info = torch.linalg.cholesky_ex(matrix)
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        inverse.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        failures.append(info != 0)
        return
    half = size // 2
    first, last = inverse[:half, :half], inverse[half:, half:]
    _factor_into(matrix[:half, :half], first, failures)
    corner = matrix[half:, :half] @ first.t()
    rest = matrix[half:, half:].addmm_(corner, corner.t(), alpha=-1)
    _factor_into(rest, last, failures)
    torch.mm(torch.mm(last, corner.neg_()), first, out=inverse[half:, :half])
