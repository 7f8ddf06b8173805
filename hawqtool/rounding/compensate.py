"""The column loop of GPTQ and of FOEM."""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.rounding.factor import Factor

BLOCK_SIZE = 32
"""Columns per lazy update: 32 was up to twice as fast as the customary 128 on a CPU; the codes do not depend on it."""


def round_compensated(
    weight: Tensor,
    step: Tensor,
    lowest: Tensor,
    highest: Tensor,
    factor: Factor,
    beta: float = 0.0,
    block_size: int = BLOCK_SIZE,
    zero: Tensor | None = None,
) -> Tensor:
    """Round column by column, spreading each error over the columns still to come.

    With the drift c (zero at the start) and U from the factor, for each column j in visiting order:
    ``q_j = round(w0_j + (1-β) c_j)``, ``e_j = [w0_j + (1-β)² c_j - q_j] / U_jj``, ``c_k -= e_j U_jk`` for k > j.
    β = 0 is GPTQ (Frantar et al. 2023, Algorithm 1); β > 0 is FOEM (arXiv 2507.11017, eq. 19 applied to each
    column once, just before it is rounded, so the block size does not matter); β = 1 is plain rounding. Here q_j is
    the nearest value of the grid, ``step * code``, or ``step * (code - zero)``.

    Rows are independent: layers that share inputs, and several formats of one layer, may be stacked.

    Args:
        weight: ``[rows, in]`` float32.
        step: ``[rows, in]`` float32, the scale of each weight (may be negative).
        lowest: ``[rows]`` float32, smallest code of each row.
        highest: ``[rows]`` float32, largest code of each row.
        factor: Factor of the Gram matrix of the inputs.
        beta: FOEM's pull towards the original weights, 0 to 1.
        block_size: Columns whose updates to later columns are applied together.
        zero: ``[rows, in]`` float32, the zero point of each weight, an integer; None for symmetric grids.

    Returns:
        Codes, ``[rows, in]`` int8, in natural column order.
    """
    # Columns become contiguous rows: the loop then runs on contiguous memory.
    target = weight.t()[factor.order].contiguous()
    steps = step.t()[factor.order].contiguous()
    zeros = None if zero is None else zero.t()[factor.order].contiguous()
    drift = torch.zeros_like(target)
    # Codes less their zeros: a zero is an integer, so it moves the range and nothing else.
    levels = torch.empty_like(target)
    keep, keep_squared = 1.0 - beta, (1.0 - beta) ** 2
    columns = target.shape[0]
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        errors = torch.empty_like(target[first:last])
        for j in range(first, last):
            level = torch.add(target[j], drift[j], alpha=keep).div_(steps[j]).round_()
            low, high = (lowest, highest) if zeros is None else (lowest - zeros[j], highest - zeros[j])
            torch.minimum(torch.maximum(level, low), high, out=levels[j])
            error = torch.add(target[j], drift[j], alpha=keep_squared)
            error.addcmul_(levels[j], steps[j], value=-1.0).div_(factor.upper[j, j])
            errors[j - first] = error
            if j + 1 < last:
                drift[j + 1 : last].addr_(factor.upper[j, j + 1 : last], error, alpha=-1.0)
        if last < columns:
            drift[last:].addmm_(factor.upper[first:last, last:].t(), errors, alpha=-1.0)
    codes = levels if zeros is None else levels.add_(zeros)
    result = torch.empty_like(codes, dtype=torch.int8)
    result[factor.order] = codes.to(torch.int8)
    return result.t().contiguous()
