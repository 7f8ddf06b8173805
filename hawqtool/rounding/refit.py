"""Scales refitted to codes that are fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.rounding.grid import Quantized, dequantize


def refit_scales(rounded: Quantized, target: Tensor, gram: Tensor) -> Quantized:
    """The same codes with scales that lower tr(D H Dᵀ), D = Q - target, one group after the other.

    The error is a parabola in each scale: with L the codes less their zeros, the best change of s of a row and group g
    is ``-[L_g (H Dᵀ)_g] / [L_g H_gg L_gᵀ]``. It is cast to the stored dtype, and taken where the error falls even so;
    D then has it before the next group's turn. Rows are independent.

    Args:
        rounded: Codes, scales and zero points.
        target: ``[out, in]`` float32, what the rounded weights approximate.
        gram: ``[in, in]`` float32, H, damped.
    """
    codes, scales, zeros = rounded
    groups = scales.shape[1]
    width = codes.shape[1] // groups
    error = dequantize(*rounded).float() - target
    found = scales.clone()
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        zero = None if zeros is None else zeros[:, group : group + 1]
        levels = codes[:, part].float() if zero is None else codes[:, part].float() - zero.float()
        pull, block = error @ gram[:, part], gram[part, part]
        slope, curvature = (pull * levels).sum(1), ((levels @ block) * levels).sum(1)
        old = scales[:, group]
        step = torch.where(curvature > 0, slope / curvature, 0.0)
        scale = (old.float() - step).to(old.dtype)
        # The products are rounded as well, so the gain is measured on the weights that loaders compute.
        change = dequantize(codes[:, part], scale.unsqueeze(1), zero).float() - target[:, part] - error[:, part]
        gain = 2 * (pull * change).sum(1) + ((change @ block) * change).sum(1)
        # A scale keeps its sign, and is never zero.
        taken = (gain < 0) & torch.isfinite(scale) & (scale.sign() == old.sign())
        found[:, group] = torch.where(taken, scale, old)
        error[:, part] += torch.where(taken.unsqueeze(1), change, 0.0)
    return Quantized(codes, found, zeros)
