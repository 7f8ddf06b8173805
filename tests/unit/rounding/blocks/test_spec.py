"""Rounding of a layer to block types: the guard on held-out rows, and the second pass."""

from __future__ import annotations

import pytest
import torch

from hawqtool.checkpoint.gguf.block_codec import block_grid, grid_values
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES
from hawqtool.rounding.blocks.spec import round_blocks, round_layer
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.gptq import row_losses
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics

torch.set_num_threads(1)
KIND = BLOCK_TYPES["Q4_0"]


def gram(seed: int) -> torch.Tensor:
    x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(8, 64, generator=torch.Generator().manual_seed(seed + 1))
    return x.T @ x / len(x) + 0.01 * torch.eye(64)


@pytest.mark.parametrize("alike", [True, False])
def test_a_layer_is_compensated_where_that_is_better_on_held_out_rows(alike: bool) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    own, other = gram(1), gram(1) if alike else 3 * torch.eye(64)
    held_out = GroupStatistics(other, 256, 256)
    statistics = GroupStatistics(0.75 * own + 0.25 * other, 1024, 1024, held_out=held_out)
    assert statistics.fitting is not None
    task = Task("layer", weight, KIND, torch.bfloat16)  # type: ignore[arg-type]
    factor, part = (factorize(each.gram, 1024, 0.01) for each in (statistics, statistics.fitting))
    layer = round_layer(task, factor, statistics, RoundingMethod("gptq", damping=0.01), part)
    assert layer.compensated == alike
    plain = round_layer(task, factor, statistics, RoundingMethod("rtn"))
    assert torch.equal(layer.values, plain.values) != alike


def test_a_second_pass_never_loses_a_row() -> None:
    weight, factor = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), factorize(gram(1), 1024)
    losses = []
    for passes in (1, 2):
        fields = round_blocks(weight, factor.conditional, factor, KIND, passes)
        losses.append(row_losses(weight, grid_values(fields.codes, block_grid(fields, KIND), KIND), factor))
    assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all()) and losses[1].sum() < 0.995 * losses[0].sum()
