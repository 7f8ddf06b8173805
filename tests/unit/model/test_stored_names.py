"""Stored names of the parameters of a model, as transformers' own loader pairs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hawqtool.model.skeleton import build_skeleton
from hawqtool.model.stored_names import stored_names
from tests.support.tiny_zoo import kind_named, save_kind

LAYOUTS = (
    *("llama", "mixtral", "phimoe", "deepseek_v3", "gpt_oss", "minimax_m2", "bert", "nomic_bert", "clip_text_model"),
    *("lfm2", "t5", "gemma3", "qwen2_5_vl", "nemotron_h"),
)
"""Types whose names are compared here; `scripts/stored_layouts.py --check` compares all."""


def test_transformers_stores_under_the_frozen_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "scripts"))
    import stored_layouts

    families = {family.model_type: family for family in stored_layouts.read_families().values()}
    assert len(families) > 100
    for layout in LAYOUTS:
        family = families[layout]
        assert not stored_layouts.differences(family, stored_layouts.stored_now(family)), layout
    renamed = {name.replace("norm_f", "norm"): 1 + ndim for name, ndim in family.tensors.items() if "norm_f" in name}
    others = {name: ndim for name, ndim in family.tensors.items() if "norm_f" not in name}
    assert len(renamed) == 1 and stored_layouts.differences(family, others | renamed) == [
        "backbone.norm.weight is new",
        "backbone.norm_f.weight is no longer stored",
    ]


def names_of(name: str, folder: Path) -> tuple[dict[str, str], set[str]]:
    source = save_kind(kind_named(name), folder)
    tensors = set(load_file(source / "model.safetensors"))
    return stored_names(build_skeleton(source, torch.float32), sorted(tensors)), tensors


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe", "vit", "neox-serial", "bert", "bert-masked"])
def test_every_tensor_has_one_parameter(tmp_path: Path, name: str) -> None:
    names, tensors = names_of(name, tmp_path)
    assert set(names.values()) == tensors
    assert len(names) == len(tensors)


@pytest.mark.parametrize(
    ("name", "parameter", "stored"),
    [
        ("mixtral", "1.mlp.experts.2.gate_proj.weight", "1.block_sparse_moe.experts.2.w1.weight"),
        ("mixtral", "1.mlp.experts.2.up_proj.weight", "1.block_sparse_moe.experts.2.w3.weight"),
        ("mixtral", "0.mlp.experts.3.down_proj.weight", "0.block_sparse_moe.experts.3.w2.weight"),
        ("qwen3-moe", "0.mlp.experts.7.up_proj.weight", "0.mlp.experts.7.up_proj.weight"),
    ],
)
def test_experts(tmp_path: Path, name: str, parameter: str, stored: str) -> None:
    assert names_of(name, tmp_path)[0][f"model.layers.{parameter}"] == f"model.layers.{stored}"


def test_a_prefix_may_be_missing_or_one_too_many(tmp_path: Path) -> None:
    bare = build_skeleton(save_kind(kind_named("bert"), tmp_path / "bare"), torch.float32)
    headed = build_skeleton(save_kind(kind_named("bert-masked"), tmp_path / "headed"), torch.float32)
    inner = "encoder.layer.0.attention.self.query.weight"
    assert stored_names(bare, [f"bert.{inner}"]) == {inner: f"bert.{inner}"}
    assert stored_names(headed, [inner]) == {f"bert.{inner}": inner}


def test_old_names_of_norms_give_way_to_the_own_name(tmp_path: Path) -> None:
    model = build_skeleton(save_kind(kind_named("bert"), tmp_path), torch.float32)
    old = {"weight": "embeddings.LayerNorm.gamma", "bias": "embeddings.LayerNorm.beta"}
    for leaf, stored in old.items():
        own = f"embeddings.LayerNorm.{leaf}"
        assert stored_names(model, [stored]) == {own: stored}
        assert stored_names(model, [stored, own]) == stored_names(model, [own, stored]) == {own: own}


def test_unknown_tensors_are_left_out(tmp_path: Path) -> None:
    model = build_skeleton(save_kind(kind_named("llama"), tmp_path), torch.float32)
    assert stored_names(model, ["model.layers.0.self_attn.rotary_emb.inv_freq", "other.weight"]) == {}
