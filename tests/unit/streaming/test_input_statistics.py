"""Linears that a block's trace calls and its work on data does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.pipeline.run.job import prepare
from hawqtool.streaming.input_statistics import collect_statistics
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_module_that_reads_a_weight_by_itself_is_named(tmp_path: Path, batch_size: int) -> None:
    kind = kind_named("llama")
    job = prepare(RunConfig(model=str(save_kind(kind, tmp_path)), group_size=32, device="cpu"))
    stream = job.stream()
    activations = stream.embed(calibration_inputs(kind), batch_size)
    with stream.block(0) as block, pytest.raises(InputError, match=r"mlp\.down_proj was not called with data"):
        mlp: Any = block.module.mlp

        def fused(x: torch.Tensor) -> torch.Tensor:
            return linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight, mlp.down_proj.bias)

        mlp.forward = fused
        collect_statistics(block, activations, list)
