"""Largest inputs of linears in the original model, from which stored divisors of input scales follow."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hawqtool.records import LinearSpec
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.streaming.block import advance
from hawqtool.streaming.input_statistics import group_inputs
from hawqtool.streaming.stream import ModelStream


def input_peaks(
    stream: ModelStream, rows: Tensor, batch_size: int, units: Collection[str], ranks: Ranks = ALONE
) -> dict[str, float]:
    """Largest magnitude that any linear of a unit sees at its input, by one walk through the original model.

    A unit has one, since engines fuse its linears and take one divisor for all.

    Args:
        stream: The original model, with inputs as they are.
        rows: ``[rows, positions]`` tokens, or images, of all ranks.
        batch_size: Rows per forward pass.
        units: The units wanted.
        ranks: Processes that share the rows; each gets what all of them saw.
    """
    found: dict[str, Tensor] = {}

    def see(group: Sequence[LinearSpec], x: Tensor, _: int) -> None:
        for unit in {linear.unit for linear in group if linear.unit in units} if x.numel() else ():
            peak = x.detach().abs().amax().float()
            found[unit] = torch.maximum(found[unit], peak) if unit in found else peak

    activations = stream.embed(rows[ranks.share(len(rows))], batch_size)
    for spec in stream.structure.blocks:
        with stream.block(spec.index) as block, group_inputs(block, see):
            advance(block, activations)
    shares = ranks.everywhere({unit: float(peak) for unit, peak in found.items()})
    return {unit: max(share.get(unit, 0.0) for share in shares) for unit in dict.fromkeys(u for s in shares for u in s)}
