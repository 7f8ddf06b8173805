"""Damping, column order and triangular factor of a Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.errors import NumericalError

SCARCE_TOKENS_PER_COLUMN = 8
DAMPING, SCARCE_DAMPING = 0.05, 0.2
_RETRY_FACTOR, _MAX_RETRIES = 4.0, 6
_DIRECT_INVERSE = 128


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

    One Cholesky factorisation of the matrix with both axes flipped gives R upper with H̃ = R Rᵀ, and
    U = R⁻¹ (GPTQ, Frantar et al. 2023, uses the same U from three factorisations). The arithmetic is float64.

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
    work = gram.index_select(0, backwards).index_select(1, backwards).double()
    sorted_diagonal = work.diagonal().clone()
    for retries in range(_MAX_RETRIES + 1):  # noqa: B007 (read after the loop)
        work.diagonal().copy_(sorted_diagonal + fraction * mean)
        lower, info = torch.linalg.cholesky_ex(work)
        if int(info) == 0:
            break
        fraction = max(fraction, 1e-4) * _RETRY_FACTOR
    else:
        raise NumericalError(
            f"{name}: Cholesky failed even with damping {fraction / _RETRY_FACTOR:.3g} of the mean diagonal"
        )
    del work  # of wide layers each of these takes gigabytes
    right = lower.flip(0, 1)
    del lower
    return Factor(
        upper=inverse_upper(right).float(),
        pivots=right.diagonal().float().clone(),
        order=order,
        diagonal=(diagonal + fraction * mean).float(),
        damping=fraction,
        retries=retries,
        dead_inputs=int(dead),
        num_tokens=num_tokens,
    )


def inverse_upper(matrix: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix ``[n, n]``.

    Halves are inverted by themselves, so zeros are not multiplied: a third of the work of solving for the identity.
    """
    inverse = torch.zeros_like(matrix)
    _invert_into(matrix, inverse)
    return inverse


def _invert_into(matrix: Tensor, inverse: Tensor) -> None:
    """Write the inverse of an upper triangular matrix on and above the diagonal of another."""
    size = len(matrix)
    if size <= _DIRECT_INVERSE:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        inverse.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    _invert_into(matrix[:half, :half], inverse[:half, :half])
    _invert_into(matrix[half:, half:], inverse[half:, half:])
    corner = matrix[:half, half:] @ inverse[half:, half:]
    torch.mm(inverse[:half, :half], corner.neg_(), out=inverse[:half, half:])
