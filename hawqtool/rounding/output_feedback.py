"""Output-side feedback: later rows of a weight make up for what the rounding of earlier ones did to the loss.

To second order, and as far as inputs x and gradients g at the output are independent, a rounding error E costs
J = tr(S E H Eᵀ), with H the Gram matrix of the inputs and S = E[g gᵀ] up to scale. With S = R Rᵀ and H = T Tᵀ, both
upper triangular, J = ‖Rᵀ E T‖²; the column loop takes S for the identity. As it feeds errors forward through T, rows do
through R: an element hears of those that are neither right of it nor below it, so that no order of the sides matters.
YAQA (arXiv 2505.22988) rounds so; here rows go in blocks, whose members do not hear of each other, which leaves the
column loop as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hawqtool.records import OutputMoments
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.kernels.cuda_graph import Function, Repeated
from hawqtool.rounding.two_pass import Problem, refit, round_targets
from hawqtool.runtime.stage_timer import UNRECORDED

ROW_BLOCKS = 16
"""Blocks of rows that are rounded one after the other; fewer where there are fewer rows.

48 took off 0 to 2 points more of a hundred of KL on SmolLM2 and its copy, for three times the loops.
"""

DAMPINGS = (0.03, 0.1, 0.3, 1.0)
"""What the damping of S is chosen from, over its mean diagonal."""

WORTHWHILE = 0.97
"""Predicted loss, relative to that without feedback, above which a layer is rounded without."""


@dataclass(frozen=True)
class RowFeedback:
    """How the rows of a layer hear of each other.

    Args:
        factor: Factor of S + λI; its order is that of the rows.
        num_blocks: Most blocks of rows.
    """

    factor: Factor
    num_blocks: int = ROW_BLOCKS

    @property
    def blocks(self) -> list[slice]:
        """Blocks of rows, as places in the order."""
        return row_blocks(len(self.factor.order), self.num_blocks)


def row_blocks(rows: int, num_blocks: int = ROW_BLOCKS) -> list[slice]:
    """Blocks of so many rows, equally high but for the last."""
    height = -(-rows // num_blocks)
    return [slice(first, min(first + height, rows)) for first in range(0, rows, height)]


def pack_lower(matrix: Tensor) -> Tensor:
    """Lower triangle of a symmetric ``[n, n]``, row by row: ``[n (n + 1) / 2]``."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).tril()]


def unpack_lower(lower: Tensor, device: torch.device | None = None) -> Tensor:
    """The symmetric matrix ``[n, n]`` of a packed triangle."""
    lower = lower.to(device)
    size = int((2 * lower.numel() + 0.25) ** 0.5)
    matrix = lower.new_zeros(size, size)
    matrix[torch.ones_like(matrix, dtype=torch.bool).tril()] = lower
    return matrix + matrix.tril(-1).t()


def predicted_ratios(fitting: Tensor, held_out: Tensor, dampings: Sequence[float]) -> list[float]:
    """Loss on other tokens that rounding with feedback leaves, relative to that without: ρ, without rounding.

    Feedback turns rounding errors ε of the rows into E = Bᵀ ε, with B = diag(U_bb)⁻¹ U over the blocks b and U the
    factor of the fitting tokens' S. With ε alike in all rows and independent, the loss tr(S' E H Eᵀ) is to that of ε
    as tr(B S' Bᵀ) to tr(S').

    Args:
        fitting: ``[out, out]`` float32, S of the tokens that feedback is made from.
        held_out: ``[out, out]`` float32, S' of other tokens.
        dampings: λ over the mean diagonal, of each ratio.
    """
    factors = [factorize(fitting, len(fitting), damping, name="the gradients") for damping in dampings]
    order = factors[0].order  # that of the diagonal, with any damping
    other = held_out[order][:, order]
    spreads = (_spread(factor.upper) for factor in factors)
    found = torch.stack([((spread @ other) * spread).sum() for spread in spreads])
    return list(map(float, (found / other.trace()).tolist()))  # brought to the host together


def _spread(upper: Tensor) -> Tensor:
    """B = diag(U_bb)⁻¹ U, ``[out, out]``: blocks of one height together, as a GPU waits for launches, then the rest."""
    size = len(upper)
    height = row_blocks(size)[0].stop
    cut = size - size % height
    blocks = (cut // height, height)
    corners = upper[:cut, :cut].unflatten(0, blocks).unflatten(2, blocks).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    rows = upper[:cut].unflatten(0, blocks)
    spread = torch.linalg.solve_triangular(corners, rows, upper=True).flatten(0, 1)
    if cut == size:
        return spread
    return torch.cat([spread, torch.linalg.solve_triangular(upper[cut:, cut:], upper[cut:], upper=True)])


def choose_moments(fitting: Tensor, held_out: Tensor, keep_held_out: bool) -> OutputMoments:
    """Moments of all tokens with the damping of least predicted ratio; empty ones where that is not worthwhile.

    Args:
        fitting: ``[out, out]`` float32, sum of g gᵀ / ‖g‖ over three quarters of the rows.
        held_out: ``[out, out]`` float32, the same over the other rows.
        keep_held_out: Whether settings are going to be chosen on these.
    """
    if not bool(held_out.trace() > 0) or not bool(fitting.trace() > 0):  # no gradient arrives
        return OutputMoments(ratio=1.0)
    ratios = dict(zip(DAMPINGS, predicted_ratios(fitting, held_out, DAMPINGS), strict=True))
    damping = min(ratios, key=lambda d: ratios[d])
    if not ratios[damping] <= WORTHWHILE:
        return OutputMoments(ratios[damping])
    kept = pack_lower(held_out).cpu() if keep_held_out else None
    return OutputMoments(ratios[damping], damping, pack_lower(fitting + held_out).cpu(), kept)


def row_feedback(moments: OutputMoments, device: torch.device, fitting: bool = False) -> RowFeedback | None:
    """Feedback of a layer, of all tokens or of those that are not held out; None where it is not worthwhile."""
    if moments.lower is None or moments.damping is None:
        return None
    lower = moments.lower
    if fitting:
        assert moments.held_out is not None  # it is kept where settings are chosen
        lower = lower - moments.held_out
    matrix = unpack_lower(lower, device)
    return RowFeedback(factorize(matrix, len(matrix), moments.damping, name="the gradients"))


def round_row_blocks(problem: Problem, beta: float, feedback: RowFeedback, gram: Tensor | None = None) -> Quantized:
    """Round one layer, block after block of rows, each on what the blocks before leave it to make up for.

    Block b, with U the factor of S + λI and d all rows before it: T_b = W_b + U_dbᵀ V_d, where V_b = U_bb⁻ᵀ (Q_b - T_b)
    is what later blocks hear of. It is W_b - S_rr⁻¹ S_rd (Q_d - W_d), of the rows r still to come, in its rows b: what
    is best for J whatever is done there. J is Σ_b tr(V_b H V_bᵀ). Grids are searched on T_b, in each pass.

    Args:
        problem: A single task with its targets, without grids.
        beta: β of the column loop.
        feedback: Feedback of the rows.
        gram: Gram matrix to which the scales of each block are refitted; None for none.
    """
    (target,), upper = problem.targets, feedback.factor.upper
    ordered, told = target.index_select(0, feedback.factor.order), torch.zeros_like(target)
    round_block: Function = partial(_round_block, problem, beta, gram)
    if target.is_cuda and _can_be_recorded(problem, beta, gram):
        round_block = Repeated(round_block)
    results = []
    for part in feedback.blocks:
        wanted = ordered[part]
        if part.start:
            wanted = wanted + upper[: part.start, part].t() @ told[: part.start]
        codes, scales, error, *zeros = round_block(wanted)
        told[part] = torch.linalg.solve_triangular(upper[part, part].t(), error, upper=False)
        results.append(Quantized(codes, scales, zeros[0] if zeros else None, problem.tasks[0].divisor))
    return _joined(results, feedback.factor.order.argsort())


def _round_block(problem: Problem, beta: float, gram: Tensor | None, wanted: Tensor) -> tuple[Tensor, ...]:
    """Codes, scales and errors of one block of rows, and zero points where it has any, each ``[rows, ...]``."""
    rows = replace(problem.tasks[0], weight=wanted)
    block = replace(problem, tasks=[rows], targets=[wanted], goals=[wanted], grids=[problem.search(rows, wanted)])
    (result,) = round_targets(block, [beta])
    if gram is not None:
        (result,) = refit(block, [result], gram)
    zeros = () if result.zeros is None else (result.zeros,)
    return result.codes, result.scales, dequantize(*result).float() - wanted, *zeros


def _can_be_recorded(problem: Problem, beta: float, gram: Tensor | None) -> bool:
    """Whether a block of rows is rounded without waiting for the device: what output feedback has by default."""
    is_plain = gram is None and beta == 0 and problem.tasks[0].quant_format.floats is None
    return is_plain and problem.recorder is UNRECORDED


def _joined(results: list[Quantized], places: Tensor) -> Quantized:
    """Blocks of rows in one, rows in natural order."""
    codes = torch.cat([r.codes.view(torch.int8) for r in results]).index_select(0, places).view(results[0].codes.dtype)
    scales = torch.cat([r.scales for r in results]).index_select(0, places)
    zeros = [result.zeros for result in results if result.zeros is not None]
    joined = torch.cat(zeros).index_select(0, places) if zeros else None
    return Quantized(codes, scales, joined, results[0].divisor)
