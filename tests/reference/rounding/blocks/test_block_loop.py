"""Compensated rounding on block grids against the column loop in float64, written out."""

from __future__ import annotations

import pytest
import torch

from hawqtool.checkpoint.gguf.block_codec import block_grid, dequantize_blocks, grid_values, pack_blocks
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES
from hawqtool.rounding.blocks.block_loop import round_block_codes
from hawqtool.rounding.blocks.block_search import search_blocks
from hawqtool.rounding.factor import factorize

torch.set_num_threads(1)


def problem(columns: int = 256, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Gram matrix of correlated inputs of unequal sizes."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(1024, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    x *= torch.linspace(0.2, 3, columns)[torch.randperm(columns, generator=random)]
    return torch.randn(rows, columns, generator=random) * 0.05 + 0.01, x.T @ x / len(x)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_1", "Q5_0", "IQ4_XS"])
def test_codes_are_those_of_the_written_out_loop(name: str) -> None:
    kind, (weight, gram) = BLOCK_TYPES[name], problem()
    factor = factorize(gram, 1024)
    fields = search_blocks(weight, factor.diagonal, kind)
    grid = block_grid(fields, kind)
    found = round_block_codes(weight, grid, factor, kind)
    steps, offsets = (None if part is None else part.double().repeat_interleave(kind.group_size, 1) for part in grid)
    assert steps is not None
    target, upper = weight.double().clone(), factor.upper.double()
    codes = torch.empty_like(target)
    values = torch.tensor(kind.codebook).double()
    for place, column in enumerate(factor.order.tolist()):
        offset = 0.0 if offsets is None else offsets[:, column]
        levels = steps[:, column, None] * values
        nearest = (target[:, column, None] - levels - (offset[:, None] if offsets is not None else 0)).abs().argmin(1)
        codes[:, column] = nearest + kind.min_code
        error = (target[:, column] - steps[:, column] * values[nearest] - offset) / upper[place, place]
        later = factor.order[place + 1 :]
        target[:, later] -= error[:, None] * upper[place, place + 1 :]
    # A tie that float32 breaks the other way moves the columns that follow: few codes may differ.
    assert (found.double() != codes).double().mean() < 0.01
    stored = pack_blocks(fields._replace(codes=found), kind)
    ours = dequantize_blocks(stored, kind)
    assert torch.equal(ours, grid_values(found, grid, kind))

    def loss(values: torch.Tensor) -> float:
        difference = values.double() - weight.double()
        return float(((difference @ gram.double()) * difference).sum())

    assert loss(ours) < 0.9 * loss(grid_values(fields.codes, grid, kind))
    assert loss(ours) == pytest.approx(
        loss(values[codes.long() - kind.min_code] * steps + (0.0 if offsets is None else offsets)), rel=0.03
    )
