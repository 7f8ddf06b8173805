"""The search of stored scales: better than gguf's where that has a quantizer, and sound at the edges."""

from __future__ import annotations

import pytest
import torch

from hawqtool.checkpoint.gguf.block_codec import block_grid, dequantize_blocks, grid_values, pack_blocks
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType
from hawqtool.rounding.blocks.block_search import search_blocks
from tests.support import llama_cpp

torch.set_num_threads(1)
KINDS = list(BLOCK_TYPES.values())


def weights(rows: int = 8, columns: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, generator=random) * 0.04, torch.rand(columns, generator=random) * 3 + 0.01


def error(values: torch.Tensor, weight: torch.Tensor, costs: torch.Tensor) -> float:
    return float(((values - weight).square() * costs).sum() / (weight.square() * costs).sum())


BOUNDS = {
    **{"Q8_0": 4e-5, "Q6_K": 6e-4, "Q5_0": 2e-3, "Q5_1": 1.6e-3, "Q5_K": 2e-3, "Q4_0": 7.5e-3, "Q4_1": 7e-3},
    **{"Q4_K": 7.5e-3, "IQ4_NL": 6.5e-3, "IQ4_XS": 7e-3, "Q3_K": 2.7e-2, "Q2_K": 8.5e-2},
}
"""Relative errors of a Gaussian weight; a uniform grid of b bits over 32 weights has these within a few percent."""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_error_is_small_and_that_of_the_stored_bytes(kind: BlockType) -> None:
    weight, costs = weights()
    fields = search_blocks(weight, costs, kind)
    values = grid_values(fields.codes, block_grid(fields, kind), kind)
    assert torch.equal(dequantize_blocks(pack_blocks(fields, kind), kind), values)
    assert error(values, weight, costs) < BOUNDS[kind.name]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_it_is_no_worse_than_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    (weight, costs), kind = weights(), BLOCK_TYPES[name]
    theirs = gguf.GGMLQuantizationType[name]
    other = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), theirs), theirs))
    fields = search_blocks(weight, costs, kind)
    values = grid_values(fields.codes, block_grid(fields, kind), kind)
    assert error(values, weight, costs) <= error(other, weight, costs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_odd_blocks_stay_finite(kind: BlockType) -> None:
    weight, costs = weights(6)
    weight[0] = 0
    weight[1] = -0.25
    weight[2] = 0.25
    weight[3, :300] = 0
    weight[4] *= 1e-9
    weight[5] *= 1e4
    fields = search_blocks(weight, costs, kind)
    values = grid_values(fields.codes, block_grid(fields, kind), kind)
    assert bool(torch.isfinite(values).all()) and not bool(values[0].any())
    assert error(values[[5]], weight[[5]], costs) < 1.2 * BOUNDS[kind.name]
    assert float((values[1:3] - weight[1:3]).abs().max()) < 0.02


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q4_K", "Q5_K"])
def test_weights_that_were_rounded_before_are_found_again(name: str) -> None:
    random, kind = torch.Generator().manual_seed(7), BLOCK_TYPES[name]
    codes = torch.randint(0, 16, (8, 8, 32), generator=random).float()
    codes[::2] = codes[::2].clamp(1, 14)  # some blocks do not use the ends of their range
    steps = (0.01 + 0.02 * torch.rand(8, 8, 1, generator=random)).half().float()
    weight, costs = (steps * codes - (8 * steps).half().float()).view(8, 256), weights(8, 256)[1]
    fields = search_blocks(weight, costs, kind)
    values = grid_values(fields.codes, block_grid(fields, kind), kind)
    # Scales of K types have six bits, and so are off by up to a percent.
    assert error(values, weight, costs) < (2e-6 if kind.block_size == 32 else 3e-4)


@pytest.mark.skipif(llama_cpp.library() is None, reason="xllamacpp, which brings ggml, is not installed")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_no_worse_than_ggml_with_an_importance_matrix(kind: BlockType) -> None:
    weight, costs = weights(32)
    for rows in (weight, (weight / 0.01).round() * 0.01):
        other = dequantize_blocks(llama_cpp.quantized(rows, kind, costs), kind)
        fields = search_blocks(rows, costs, kind)
        values = grid_values(fields.codes, block_grid(fields, kind), kind)
        assert error(values, rows, costs) <= error(other, rows, costs)
