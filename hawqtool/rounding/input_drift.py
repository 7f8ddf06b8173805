"""Rounding for inputs that differ from the original model's, because earlier layers are rounded already.

With x the input that a layer gets and x0 the original model's, the output to reach is W x0, not W x. What is known of
the difference is the drift Δ = mean of (x0 - x) xᵀ, beside the Gram matrix H of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hawqtool.rounding.factor import Factor
from hawqtool.rounding.gram import fine_product, quadratic_form
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.method import Task
from hawqtool.rounding.statistics import GroupStatistics


def full_shift(weight: Tensor, drift: Tensor, factor: Factor) -> Tensor:
    """W Δ (H + λI)⁻¹: added to W it gives the weight whose output on x is closest to W x0.

    Rounding W + a times this with GPTQ is the target shift of QEP (arXiv 2504.09629, a = 1/2) and, at a = 1, what
    Qronos (arXiv 2505.11695) reaches step by step.

    Args:
        weight: ``[out, in]`` float32.
        drift: ``[in, in]`` float32.
        factor: Factor of H + λI.

    Returns:
        ``[out, in]`` float32.
    """
    return solved_shift(fine_product(weight, drift), factor)


def solved_shift(moved: Tensor, factor: Factor) -> Tensor:
    """`full_shift` from W Δ, ``[out, in]`` float32."""
    shift = torch.empty_like(moved)
    shift[:, factor.order] = fine_product(fine_product(moved[:, factor.order], factor.upper.t()), factor.upper)
    return shift


def best_shift(weight: Tensor, shift: Tensor, statistics: GroupStatistics, across: Tensor | None = None) -> float:
    """The share of a shift, 0 to 1, with the least output error on other tokens than those behind the shift.

    Before rounding the error is a parabola in the share, a² tr(S H Sᵀ) - 2 a tr(S (W Δ)ᵀ) + const, and rounding adds
    to it what hardly depends on a.

    Args:
        weight: ``[out, in]`` float32.
        shift: ``[out, in]`` float32, S.
        statistics: Gram matrix and drift of the other tokens.
        across: ``[out, out]`` float32, what errors of outputs cost together; None where each costs as much by itself.
    """
    assert statistics.drift is not None  # the shift came of one
    weighted = shift if across is None else across @ shift
    gain = (weighted * (weight @ statistics.drift)).sum()
    cost = ((shift @ statistics.gram) * weighted).sum()
    return float(torch.where(cost > 0, gain / cost, 0.0).clamp(0.0, 1.0))


def held_out_errors(
    tasks: Sequence[Task], results: Sequence[Quantized], statistics: GroupStatistics, across: Tensor | None = None
) -> Tensor:
    """Mean of (Q x - W x0)² of every task, less what does not depend on Q: ``[tasks]`` float32.

    With S ``[out, out]`` across the rows it is the mean of (Q x - W x0)ᵀ S (Q x - W x0).
    """
    errors = []
    for task, result in zip(tasks, results, strict=True):
        error = dequantize(*result).float() - task.weight
        if across is None:
            loss = quadratic_form(error, statistics.gram)
        else:
            weighted = across @ error
            loss = ((error @ statistics.gram) * weighted).sum()
            error = weighted
        if statistics.drift is not None:
            loss = loss - 2 * (error * (task.weight @ statistics.drift)).sum()
        errors.append(loss)
    return torch.stack(errors)


def gptaq_problem(weight: Tensor, drift: Tensor, factor: Factor, alpha: float) -> tuple[Tensor, Factor]:
    """GPTAQ (arXiv 2504.02692) as GPTQ with another target and another feedback matrix.

    GPTAQ adds ``w_j P_jk`` to each later column k, where w_j is column j just before it is rounded and
    ``P = α triu(Δ Uᵀ, 1) U``, beside GPTQ's ``-e_j U_jk``. P is strictly upper, so the column loop solves
    ``w (I - P) = w0 - e triu(U, 1)``: GPTQ that starts from ``w0 (I - P)⁻¹`` and feeds back
    ``triu(U, 1) (I - P)⁻¹`` gives the same codes, in one loop and one kernel.

    Args:
        weight: ``[out, in]`` float32.
        drift: ``[in, in]`` float32.
        factor: Factor of H + λI.
        alpha: α; 0 is GPTQ.

    Returns:
        Target ``[out, in]`` float32, and the factor with the feedback of GPTAQ.
    """
    order, upper = factor.order, factor.upper.double()
    transfer = alpha * torch.triu(drift.double()[order][:, order] @ upper.t(), 1) @ upper
    system = torch.eye(len(upper), dtype=upper.dtype, device=upper.device) - transfer

    def solved(rows: Tensor) -> Tensor:
        solution = torch.linalg.solve_triangular(system, rows, upper=True, left=False, unitriangular=True)
        return solution.float()

    target = torch.empty_like(weight)
    target[:, order] = solved(weight[:, order].double())
    feedback = solved(torch.triu(upper, 1)) + torch.diag(factor.upper.diagonal())
    return target, replace(factor, upper=feedback)
