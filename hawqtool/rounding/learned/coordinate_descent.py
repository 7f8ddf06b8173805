"""Coordinate descent on tr(E H Eᵀ): codes move by one where that lowers the loss, and scales follow."""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.rounding.grid import Quantized, expand_scales
from hawqtool.rounding.two_pass import refit_scales

SWEEPS = 2
"""How often codes and scales take turns."""

MOVES_PER_COLUMN = 1 / 16
"""Most codes of a row that move in a turn, per column."""

_LOOKS = 8
"""Moves between two looks at whether any row still gains: each look waits for the device."""


def descend(rounded: Quantized, quant_format: QuantFormat, goal: Tensor, gram: Tensor) -> Quantized:
    """Codes and scales that no single move of a code lowers tr(E H Eᵀ) of, E = Q - goal, or that had their moves.

    Args:
        rounded: Codes, scales and zero points to start from.
        quant_format: Range of the codes.
        goal: ``[out, in]`` float32, what the rounded weights approximate.
        gram: ``[in, in]`` float32, H, damped.
    """
    for _ in range(SWEEPS):
        rounded = refit_scales(move_codes(rounded, quant_format, goal, gram), goal, gram)
    return rounded


def move_codes(rounded: Quantized, quant_format: QuantFormat, goal: Tensor, gram: Tensor) -> Quantized:
    """Move one code of each row after the other, each time the one whose move by one gains most.

    A move of weight j of a row by d = ± s changes the loss by 2 d P_j + d² H_jj, with P = E H, to which it then adds
    d H_j. Rows are independent. Arguments are those of `descend`; E is of the values before they are stored.
    """
    codes, scales, zeros, _ = rounded
    step = expand_scales(scales, codes.shape[1])
    codes = codes.clone()
    levels = codes.float() if zeros is None else codes.float() - expand_scales(zeros, codes.shape[1])
    pull = (levels.mul_(step) - goal) @ gram
    cost = step.square() * gram.diagonal()
    rows = torch.arange(len(codes), device=codes.device)
    for move in range(max(1, int(codes.shape[1] * MOVES_PER_COLUMN))):
        slope = pull * step
        outside = torch.where(slope > 0, codes == quant_format.min_code, codes == quant_format.max_code)
        change, column = (cost - 2 * slope.abs_()).masked_fill_(outside, float("inf")).min(1)
        better = change < 0
        if move % _LOOKS == 0 and not bool(better.any()):
            break
        way = torch.where(better, -pull[rows, column].sign() * step[rows, column].sign(), 0.0)
        codes[rows, column] += way.to(torch.int8)
        pull.addcmul_((way * step[rows, column]).unsqueeze(1), gram[column])
    return Quantized(codes, scales, zeros)
