"""Experts of quantized originals that lie on the grid of their format keep their codes, and nothing else does."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.records import LinearSpec
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.lattice import on_grid
from hawqtool.rounding.layer import round_layers
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.rounding.statistics import second_moments
from tests.support.quantized_originals import integers

FMT = QuantFormat(4, 32)


def published(bits: int = 4, group: int = 32, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A matrix ``[64, 96]`` as a quantized original of that format stands for it."""
    weight = torch.randn(64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    weight[3, :32] = 0
    return integers(weight, bits, group)[1].to(dtype).float()


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [(4, 32, torch.bfloat16), (2, 32, torch.bfloat16), (3, 96, torch.float16), (4, 32, torch.float32)],
)
def test_codes_and_scales_give_the_published_weight_to_the_bit(bits: int, group: int, dtype: torch.dtype) -> None:
    weight = published(bits, group, dtype)
    found = on_grid(weight, QuantFormat(bits, CHANNEL if group == weight.shape[1] else group), dtype)
    assert found is not None
    assert found.codes.dtype == torch.int8 and found.scales.dtype == dtype
    assert torch.equal(dequantize(*found).float(), weight)


def test_weights_off_the_grid_are_seen() -> None:
    bits, weight = 4, published()
    assert on_grid(weight, QuantFormat(8, 32), torch.bfloat16) is not None  # a wider grid holds it
    assert on_grid(weight, QuantFormat(3, 32), torch.bfloat16) is None
    assert on_grid(weight, QuantFormat(bits, 32, symmetric=False), torch.bfloat16) is None
    for row in (0, 40):  # what the first row shows, and what it does not
        moved = weight.clone()
        moved[row, 5] = moved[row, 5] * (1 + 2**-6) + 2**-9
        assert on_grid(moved.bfloat16().float(), FMT, torch.bfloat16) is None
    random = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    assert on_grid(random, FMT, torch.bfloat16) is None


class _Block:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def weight(self, linear: LinearSpec) -> Tensor:
        return self.weights[linear.name]


def test_experts_alone_are_copied_and_the_report_says_so() -> None:
    names = [
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.mlp.experts.1.up_proj",
        "model.layers.0.mlp.up_proj",
    ]
    off = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    block = cast(Any, _Block(dict(zip(names, (published(), off, published()), strict=True))))
    group = [LinearSpec(name, 64, 96, 0, name, 2) for name in names]
    spec = RoundingSpec.of_plan(
        RoundingMethod("gptq"), {name: FMT for name in names}, dict.fromkeys(names, torch.bfloat16)
    )
    inputs = torch.randn(500, 96, generator=torch.Generator().manual_seed(3))
    statistics = second_moments(inputs, len(inputs))
    tasks = spec.tasks(block, group)
    layers = round_layers(tasks, statistics, spec.factor(tasks, statistics), spec.method)
    assert [layer.metrics.copied for layer in layers] == [True, False, False]
    assert layers[0].metrics.weight_error == 0
    assert torch.equal(dequantize(layers[0].codes, layers[0].scales).float(), block.weights[names[0]])
    scored = spec.roundings(block, group[:1], statistics)[names[0]][FMT.label]
    assert torch.equal(scored.rounded.codes, layers[0].codes)
