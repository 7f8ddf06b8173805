"""Proof that a rotated model computes what the original does: block by block on one row, and by its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.checkpoint.rotated.hadamard import Rotation
from hawqtool.errors import InputError
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.streaming.block import advance
from hawqtool.streaming.stream import ModelStream

TOLERANCE = 1e-3
"""Largest relative difference of a position's output in float32; a forgotten gain or reader gives more than 0.01."""


def rotation_difference(original: ModelStream, rotated: ModelStream, rotation: Rotation, row: Tensor) -> float:
    """Check on one row that each part of a rotated model gives the original's output, rotated.

    Every block of both is given the same state, in the basis of each, so that differences do not add up.

    Args:
        original: The original, computing in float32.
        rotated: The rotated one with weights as they are before they are rounded to their dtype, in float32.
        rotation: Of the residual stream.
        row: ``[1, seq_len]`` tokens.

    Returns:
        The largest relative difference ``|y' - y Q| / |y|`` of a position, over embedding, blocks and logits.

    Raises:
        InputError: If it exceeds `TOLERANCE`; names the part.
    """
    first, second = original.embed(row, 1), rotated.embed(row, 1)
    found = [_compared("the embedding", rotation.apply(first.hidden[0]), second.hidden[0])]
    for spec in original.structure.blocks:
        second.hidden[0] = rotation.apply(first.hidden[0]).to(first.hidden[0])
        with original.block(spec.index) as block:
            advance(block, first)
        with rotated.block(spec.index) as block:
            advance(block, second)
        found.append(_compared(spec.name, rotation.apply(first.hidden[0]), second.hidden[0]))
    with torch.no_grad():
        expected = original.outputs(row, first.hidden[0])
        outputs = rotated.outputs(row, rotation.apply(first.hidden[0]).to(expected))
    found.append(_compared("the output head", expected, outputs))
    return max(found)


def _compared(part: str, expected: Tensor, found: Tensor) -> float:
    """Largest relative difference of a position."""
    expected = expected.double()
    error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    largest = float(error.max())
    if not largest <= TOLERANCE:
        raise InputError(
            f"--rotate: {part} of the rotated model differs from the original's by {largest:.2g}, expected at most "
            f"{TOLERANCE:g}; this architecture cannot be rotated; use --rotate off"
        )
    return largest


def rotation_kl(original: ModelStream, rotated: ModelStream, rows: Tensor) -> float:
    """Mean KL in nats per token of the rotated model, as it is stored, from the original.

    Args:
        original: The original, computing in float32.
        rotated: The rotated model, in float32.
        rows: ``[rows, seq_len]`` tokens.
    """
    states = original.final_hidden(rows, 1, lambda _: None)
    other = rotated.final_hidden(rows, 1, lambda _: None)
    return OutputComparison(original, rotated, rows, states).evaluation(other).divergence
