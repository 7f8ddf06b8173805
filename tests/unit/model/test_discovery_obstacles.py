"""Models whose own code touches packed layers while transformers loads them are known before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hawqtool.checkpoint.index import read_index
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.discovery import discover
from hawqtool.model.kept import READ_ON_LOADING
from hawqtool.model.skeleton import build_skeleton
from hawqtool.pipeline.run.job import prepare
from tests.support.tiny import tiny_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.02,
}
TOKENS = {"vocab_size": 128, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
IMAGES = {"image_size": 32, "patch_size": 8}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nanochat": ("NanoChatConfig", "NanoChatForCausalLM", SIZES | TOKENS | {"num_key_value_heads": 2}),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        {"vocab_size": 128, "n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        SIZES | TOKENS | {"cls_token_id": 0, "sep_token_id": 1},
    ),
    "ijepa": ("IJepaConfig", "IJepaForImageClassification", SIZES | IMAGES),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", SIZES | IMAGES),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", SIZES | IMAGES),
}


def save(name: str, folder: Path) -> Path:
    config, model, settings = KINDS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)._from_config(getattr(transformers, config)(**settings), dtype=torch.float32)
    built.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_code_that_stops_at_packed_layers_is_an_obstacle(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / name)
    obstacle = discover(build_skeleton(folder, torch.float32), read_index(folder)).obstacle
    assert obstacle is not None and "its own initialization" in obstacle and "\n" not in obstacle


@pytest.mark.parametrize(
    ("name", "kept"), [("nanochat", "self_attn.o_proj"), ("gpt_bigcode", "c_proj"), ("mamba", "out_proj")]
)
def test_for_transformers_the_linears_that_its_code_reads_are_kept(name: str, kept: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / name)
    structure = discover(build_skeleton(folder, torch.float32), read_index(folder), for_transformers=True)
    read = [tensor.module for tensor in structure.kept if tensor.reason == READ_ON_LOADING]
    assert structure.obstacle is None
    assert read and all(module.endswith(f"{kept}.weight") for module in read)
    assert structure.linears and not any(module.endswith(kept) for module in structure.linears)


def test_where_its_code_reads_all_nothing_is_left_to_keep(tmp_path: Path) -> None:
    folder = save("modernbert", tmp_path / "modernbert")
    structure = discover(build_skeleton(folder, torch.float32), read_index(folder), for_transformers=True)
    assert structure.obstacle and structure.linears


def test_a_run_is_refused_before_the_work_with_what_to_do(tmp_path: Path) -> None:
    folder = save("modernbert", tmp_path / "modernbert")
    settings: dict[str, Any] = {"model": str(folder), "device": "cpu", "group_size": 32}
    with pytest.raises(InputError, match=r"transformers cannot load .* --profile vllm writes it"):
        prepare(RunConfig(**settings))
    assert prepare(RunConfig(**settings, profile="vllm")).structure.obstacle


def test_others_have_none(tmp_path: Path) -> None:
    for kind in ("llama", "qwen3"):
        folder = tiny_model(kind, tmp_path / kind)
        assert discover(build_skeleton(folder, torch.float32), read_index(folder)).obstacle is None
