"""Second moments of gradients over rows of each kind, against float64 sums of single tokens."""

from __future__ import annotations

import torch

from hawqtool.sensitivity.output_moments import FITTING, HELD_OUT, LEFT_OUT, OutputMomentSums, Sums

ROWS, TOKENS, WIDTH, BATCH = 24, 5, 6, 8
KINDS = torch.tensor([FITTING] * 7 + [HELD_OUT, LEFT_OUT] + [FITTING, HELD_OUT] * 5 + [LEFT_OUT] * 5)


def test_sums_by_kind_of_row() -> None:
    """Rows of a kind that follow on each other, some that do not, and a batch with none of a kind."""
    gradients = torch.randn(ROWS, WIDTH, TOKENS, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    gradients[3, 2] = 0.0  # a token without a gradient counts for nothing
    moments, found = OutputMomentSums(frozenset(("linear",)), KINDS, keep_held_out=True), Sums()
    for first in range(0, ROWS, BATCH):
        batch = gradients[first : first + BATCH]
        moments.visit(found, "linear", batch, batch.norm(dim=-1), first)
        moments.visit(found, "another", batch, batch.norm(dim=-1), first)
    assert list(found) == ["linear"]
    for kind in (FITTING, HELD_OUT):
        expected = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for g in gradients[kind == KINDS].double().flatten(0, 1):
            expected += torch.outer(g, g) / g.norm().clamp_min(1e-300)
        torch.testing.assert_close(found["linear"][kind].double(), expected, rtol=1e-5, atol=1e-5)
