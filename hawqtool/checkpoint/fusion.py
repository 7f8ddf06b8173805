"""Name rules for the sets of linears that serving engines fuse."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class FusedSet:
    """Linears that an engine makes one of, all children of one parent.

    Args:
        name: Name of the one.
        members: Names of the linears.
        beside: What else the parent must have, where other parents have linears of these names too.
        parent: Last part of the parent's name, where only such parents are meant.
    """

    name: str
    members: tuple[str, ...]
    beside: str | None = None
    parent: str | None = None


FUSED_SETS = (
    FusedSet("in_proj_qkvgfab", ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"), beside="f_a_proj"),
    FusedSet("kv_proj", ("k_proj", "v_proj"), parent="encoder_attn"),
    FusedSet("q_proj", ("q_proj",), parent="encoder_attn"),
    FusedSet("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    FusedSet("qkv", ("query", "key", "value")),
    FusedSet("gate_up_proj", ("gate_proj", "up_proj")),
    FusedSet("w13", ("w1", "w3")),
    FusedSet("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    FusedSet("in_proj_ba", ("in_proj_b", "in_proj_a")),
    FusedSet("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    FusedSet("fused_wqa_wkv", ("wq_a", "wkv")),
)
"""What vLLM 0.33 fuses, the first that fits: Kimi Linear's attention without softmax, Whisper's cross-attention, usual
attention, encoders, gated MLPs, LFM2, Qwen3.5 (two), latent attention of DeepSeek and its kin, DeepSeek V4."""

VLLM_UNQUANTIZED = re.compile(r"\.(compressor\.(wkv|wgate|kv_proj|gate_proj)|eh_proj)$")
"""Linears that vLLM builds without quantization whatever the file says: DeepSeek V4's compressors, draft heads."""

VLLM_UNQUANTIZED_HEADS = ("DeepseekV4ForCausalLM", "PhimoeForCausalLM")
"""Classes of models whose output head vLLM builds without quantization."""

MIXTRAL_LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Names that Mixtral and its kin have for the linears of an expert, by role."""

VLLM_LEAVES = {"granitemoe": MIXTRAL_LEAVES, "granitemoeshared": MIXTRAL_LEAVES}
"""Types of models whose experts vLLM looks for under other names than their roles, and transformers only stacked."""

VLLM_LINEARIZED = ("Llama4TextExperts",)
"""Classes of experts that transformers holds transposed and vLLM reads one by one all the same.

The others, such as those of gpt-oss, vLLM reads stacked; tensors of single experts it passes over without a word.
"""

_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<number>\d+)\.")


def is_expert(stored_name: str) -> bool:
    """Whether a linear belongs to a routed expert."""
    return _EXPERT.match(stored_name) is not None


def expert_of(stored_name: str) -> tuple[str, int] | None:
    """The experts that a linear belongs to, ``model.layers.0.mlp.experts``, and its number among them."""
    expert = _EXPERT.match(stored_name)
    return (expert["experts"], int(expert["number"])) if expert else None


def unit_name(
    stored_name: str, siblings: Container[str] = (), experts_per_block: bool = True, fuses: bool = True
) -> str:
    """Name of the allocation unit of a linear: its fused set's name under the same parent, else its own name.

    ``model.layers.0.self_attn.q_proj`` gives ``model.layers.0.self_attn.qkv_proj``. All routed experts of a block
    are one unit, for that is how engines run them.

    Args:
        stored_name: Name in the checkpoint.
        siblings: Names of all linears of the checkpoint.
        experts_per_block: Whether blocks may differ in the format of their experts. transformers reads all experts
            of a model in one format; then their unit has ``*`` in place of the block's number.
        fuses: Whether the engine fuses sets of linears; otherwise each that is no expert is a unit of its own.
    """
    expert = _EXPERT.match(stored_name)
    if expert:
        experts = expert["experts"]
        return experts if experts_per_block else re.sub(r"\.\d+\.", ".*.", experts, count=1)
    if not fuses:
        return stored_name
    parent, dot, leaf = stored_name.rpartition(".")
    for fused in FUSED_SETS:
        if leaf not in fused.members or (fused.parent and fused.parent != parent.rpartition(".")[2]):
            continue
        if fused.beside is None or f"{parent}{dot}{fused.beside}" in siblings:
            return f"{parent}{dot}{fused.name}"
    return stored_name
