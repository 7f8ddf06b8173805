"""What transformers fails on with the original itself is known before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.loading.original import cache_obstacle, precision_obstacle, scale_obstacle
from hawqtool.model.skeleton import build_skeleton
from hawqtool.pipeline.run.job import prepare
from tests.support.tiny import tiny_llama

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_n_groups": 1, "shared_intermediate_size": 64}


def save(folder: Path, config: Any, kind: str, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    getattr(transformers, kind)._from_config(config, dtype=torch.float32).to(dtype).save_pretrained(folder)
    return folder


def granite(folder: Path, kinds: list[str]) -> Path:
    settings = SIZES | MAMBA | {"num_hidden_layers": 2, "num_key_value_heads": 2, "layer_types": kinds}
    settings |= {"num_local_experts": 0, "num_experts_per_tok": 0}
    config = transformers.GraniteMoeHybridConfig(**settings)
    return save(folder, config, "GraniteMoeHybridForCausalLM", torch.bfloat16)


def xlnet(folder: Path, dtype: torch.dtype) -> Path:
    config = transformers.XLNetConfig(vocab_size=128, d_model=64, n_layer=1, n_head=4, d_inner=64)
    return save(folder, config, "XLNetLMHeadModel", dtype)


def refused(folder: Path) -> str:
    with pytest.raises(InputError, match="--profile vllm") as caught:
        prepare(RunConfig(model=str(folder)))
    return str(caught.value)


def test_state_space_blocks_alone_have_no_cache_that_transformers_can_ask_for_its_length(tmp_path: Path) -> None:
    found = refused(granite(tmp_path / "mamba", ["mamba", "mamba"]))
    assert "it fails on the original itself, where it keeps keys and values" in found and "get_seq_length" in found
    hybrid = granite(tmp_path / "hybrid", ["mamba", "attention"])
    assert cache_obstacle(build_skeleton(hybrid, torch.float32)) is None


def test_parts_that_stay_float32_are_seen_where_they_stop_a_model_of_16_bits(tmp_path: Path) -> None:
    assert "the original itself in bfloat16" in refused(xlnet(tmp_path / "half", torch.bfloat16))
    folder = xlnet(tmp_path / "full", torch.float32)
    assert precision_obstacle(build_skeleton(folder, torch.float32), torch.float32, lambda: None) is None
    llama = build_skeleton(tiny_llama(tmp_path / "llama"), torch.float32)
    assert precision_obstacle(llama, torch.bfloat16, lambda: pytest.fail("nothing stays float32")) is None


@pytest.mark.parametrize(
    ("kept", "dtype", "hit"),
    [("scale", "bfloat16", True), ("scale", "float32", False), ("hc_scale", "bfloat16", False)],
)
def test_scales_whose_name_is_among_those_kept_in_float32_are_seen(
    kept: str, dtype: str, hit: bool, tmp_path: Path
) -> None:
    model = build_skeleton(tiny_llama(tmp_path / "llama"), torch.float32)
    model._keep_in_fp32_modules_strict = {kept}
    linears = ["model.layers.0.mlp.up_proj"]
    assert (scale_obstacle(model, linears, getattr(torch, dtype)) is not None) == hit
