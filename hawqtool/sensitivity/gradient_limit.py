"""Keeps single rows from ruling scores and importance: gradients that grow far beyond the others' are shortened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.runtime.ranks import ALONE, Ranks

GRADIENT_LIMIT = 4.0
"""How many times the median growth of ‖g‖² a row may reach, hence twice that of ‖g‖: scores are made of squares.

On SmolLM2 the first tokens of a few rows carry gradients that are 45 to 300 times the median in the lower blocks; other
rows stay under 2.4 times. The losses of such rows are far from quadratic over a rounding error, so that the second
order predicts many times what is measured: with 16 scoring rows, one of them like that, the rank correlation of
``projection`` at 3 bits with measured divergences is 0.56 without a limit, 0.74 with 16 and 0.81 with 4.
"""


@dataclass
class GradientLimit:
    """Limits how much the gradient of a row grows between the last block's output and a block's input.

    Args:
        start: ``[rows]`` float64, ‖g‖² at the last block's output. Growth is counted from there, because a row's loss
            may well have a larger gradient than another's, as where a row has a single label.
        share: ``[rows]`` float64, what is left of the row's gradient; 1 where it was never shortened.
        limit: Times the median growth that is allowed; infinite for none.
    """

    start: Tensor
    share: Tensor
    limit: float = GRADIENT_LIMIT

    @classmethod
    def of(cls, gradients: Sequence[Tensor], limit: float = GRADIENT_LIMIT) -> GradientLimit:
        """Begin at the last block's output, with gradients ``[rows, positions, width]`` per batch."""
        start = row_powers(gradients)
        return cls(start, torch.ones_like(start), limit)

    def limited(self, gradients: Sequence[Tensor], ranks: Ranks = ALONE) -> list[Tensor]:
        """The gradients ``[rows, positions, width]`` per batch, those of rows that grew too much made shorter.

        The median is that of all rows, which ranks share.
        """
        shares = ranks.everywhere((row_powers(gradients), self.start))
        powers, start = (torch.cat(parts) for parts in zip(*shares, strict=True))
        first = sum(len(own) for _, own in shares[: ranks.rank])
        factors = _factors(powers, start, self.limit).sqrt()[first : first + len(self.start)]
        self.share = self.share * factors
        parts = factors.split([len(gradient) for gradient in gradients])
        # Batches without such a row stay as they are, to the bit and without a copy.
        return [
            gradient if bool((part == 1).all()) else gradient * part.to(gradient)[:, None, None]
            for gradient, part in zip(gradients, parts, strict=True)
        ]

    @property
    def shortened(self) -> int:
        """Rows whose gradient was shortened at a block or more."""
        return int((self.share < 1).sum())


def limited_powers(powers: Tensor, start: Tensor, limit: float = GRADIENT_LIMIT) -> Tensor:
    """‖g‖² of the tokens of one layer, ``[rows, positions]`` float32, those of rows that grew too much made smaller.

    Args:
        powers: ``[rows, positions]`` float32.
        start: ``[rows]`` float64, ‖g‖² at the last block's output.
        limit: Times the median growth that is allowed.
    """
    factors = _factors(powers.sum(1, dtype=torch.float64), start, limit)
    return powers if bool((factors == 1).all()) else powers * factors.to(powers)[:, None]


def _factors(powers: Tensor, start: Tensor, limit: float) -> Tensor:
    """What brings the ‖g‖² of each row down to the limit, ``[rows]`` float64; 1 where it grew less."""
    growth = powers / start.clamp(min=torch.finfo(torch.float64).tiny)
    moving = growth[growth > 0]
    if not len(moving):
        return torch.ones_like(growth)
    allowed = limit * moving.median()
    return torch.where(growth > allowed, allowed / growth, 1.0)


def row_powers(gradients: Sequence[Tensor]) -> Tensor:
    """‖g‖² per row, ``[rows]`` float64 on the CPU, of gradients ``[rows, positions, width]`` per batch."""
    return torch.cat([g.float().square().flatten(1).sum(1, dtype=torch.float64) for g in gradients]).cpu()
