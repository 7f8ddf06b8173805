"""Sets of linears that engines fuse, family by family, and what an engine never quantizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from hawqtool.checkpoint.fusion import VLLM_UNQUANTIZED, unit_name
from hawqtool.checkpoint.index import read_index
from hawqtool.export.engines import engines
from hawqtool.formats import QuantFormat
from hawqtool.model.discovery import discover
from hawqtool.model.kept import GATE
from hawqtool.model.skeleton import build_skeleton
from tests.support.tiny import VOCAB_SIZE

FAMILIES = {
    "Llama": ({"self_attn": "q_proj k_proj v_proj o_proj"}, {"qkv_proj": "q_proj k_proj v_proj", "o_proj": "o_proj"}),
    "Qwen3.5": (
        {"linear_attn": "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj"},
        {"in_proj_qkvz": "in_proj_qkv in_proj_z", "in_proj_ba": "in_proj_b in_proj_a", "out_proj": "out_proj"},
    ),
    "Qwen3-Next": (
        {"linear_attn": "in_proj_qkvz in_proj_ba"},
        {"in_proj_qkvz": "in_proj_qkvz", "in_proj_ba": "in_proj_ba"},
    ),
    "DeepSeek V3": (
        {"self_attn": "q_a_proj q_b_proj kv_a_proj_with_mqa o_proj"},
        {"fused_qkv_a_proj": "q_a_proj kv_a_proj_with_mqa", "q_b_proj": "q_b_proj", "o_proj": "o_proj"},
    ),
    "DeepSeek V4": (
        {"attn": "wq_a wq_b wkv wo_b", "shared_experts": "w1 w2 w3"},
        {"fused_wqa_wkv": "wq_a wkv", "wq_b": "wq_b", "wo_b": "wo_b", "w13": "w1 w3", "w2": "w2"},
    ),
    "LFM2": ({"feed_forward": "w1 w2 w3"}, {"w13": "w1 w3", "w2": "w2"}),
    "Kimi Linear": (
        {"self_attn": "q_proj k_proj v_proj b_proj f_a_proj f_b_proj g_a_proj"},
        {"in_proj_qkvgfab": "q_proj k_proj v_proj b_proj f_a_proj", "f_b_proj": "f_b_proj", "g_a_proj": "g_a_proj"},
    ),
    "Whisper": (
        {"encoder_attn": "q_proj k_proj v_proj out_proj"},
        {"q_proj": "q_proj", "kv_proj": "k_proj v_proj", "out_proj": "out_proj"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_vllm_fuses_is_one_unit(family: str) -> None:
    parents, expected = FAMILIES[family]
    names = [f"model.layers.0.{parent}.{leaf}" for parent, leaves in parents.items() for leaf in leaves.split()]
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(unit_name(name, names).rpartition(".")[2], []).append(name.rpartition(".")[2])
    assert {unit: sorted(members) for unit, members in found.items()} == {
        unit: sorted(members.split()) for unit, members in expected.items()
    }
    assert all(unit_name(name, names, fuses=False) == name for name in names)


def test_a_set_of_two_formats_is_no_file_for_vllm() -> None:
    names = [f"layers.0.self_attn.{leaf}" for leaf in ("q_a_proj", "kv_a_proj_with_mqa")]
    formats = dict(zip(names, (QuantFormat(4, 32), QuantFormat(8, 32)), strict=True))
    verdict = next(e for e in engines(formats, dict.fromkeys(names, (64, 64))) if e["engine"] == "vLLM (CUDA)")
    assert not verdict["loads"]
    assert "fuses layers.0.self_attn.fused_qkv_a_proj" in verdict["reason"]


def test_what_vllm_builds_unquantized() -> None:
    assert VLLM_UNQUANTIZED.search("layers.2.attn.compressor.wgate")
    assert VLLM_UNQUANTIZED.search("model.layers.2.self_attn.compressor.kv_proj")
    assert not VLLM_UNQUANTIZED.search("model.layers.2.self_attn.kv_proj")


def test_gates_of_linear_attention_stay_however_many_rows_they_have(tmp_path: Path) -> None:
    config = transformers.Qwen3_5TextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=8, linear_num_value_heads=32, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    transformers.Qwen3_5ForCausalLM(config).save_pretrained(tmp_path)
    structure = discover(build_skeleton(tmp_path, torch.float32), read_index(tmp_path))
    kept = {tensor.name: tensor.reason for tensor in structure.kept}
    place = next(name for name in kept if name.endswith("in_proj_a.weight")).removesuffix(".in_proj_a.weight")
    assert kept[f"{place}.in_proj_a.weight"] == kept[f"{place}.in_proj_b.weight"] == GATE
    units = {unit.name: {m.name.rpartition(".")[2] for m in unit.members} for unit in structure.units}
    assert units[f"{place}.in_proj_qkvz"] == {"in_proj_qkv", "in_proj_z"}
