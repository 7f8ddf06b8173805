"""Name rules for the sets of linears that serving engines fuse."""

from __future__ import annotations

import re

FUSED_SETS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("query", "key", "value"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused name and its members, all children of one parent module."""

MIXTRAL_LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Names that Mixtral and its kin have for the linears of an expert, by role."""

VLLM_LEAVES = {"granitemoe": MIXTRAL_LEAVES, "granitemoeshared": MIXTRAL_LEAVES}
"""Types of models whose experts vLLM looks for under other names than their roles, and transformers only stacked."""

VLLM_LINEARIZED = ("Llama4TextExperts",)
"""Classes of experts that transformers holds transposed and vLLM reads one by one all the same.

The others, such as those of gpt-oss, vLLM reads stacked; tensors of single experts it passes over without a word.
"""

_FUSED_NAME = {member: fused for fused, members in FUSED_SETS.items() for member in members}
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<number>\d+)\.")


def is_expert(stored_name: str) -> bool:
    """Whether a linear belongs to a routed expert."""
    return _EXPERT.match(stored_name) is not None


def expert_of(stored_name: str) -> tuple[str, int] | None:
    """The experts that a linear belongs to, ``model.layers.0.mlp.experts``, and its number among them."""
    expert = _EXPERT.match(stored_name)
    return (expert["experts"], int(expert["number"])) if expert else None


def unit_name(stored_name: str, experts_per_block: bool = True, fuses: bool = True) -> str:
    """Name of the allocation unit of a linear: its fused set's name under the same parent, else its own name.

    ``model.layers.0.self_attn.q_proj`` gives ``model.layers.0.self_attn.qkv_proj``. All routed experts of a block
    are one unit, for that is how engines run them.

    Args:
        stored_name: Name in the checkpoint.
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
    return f"{parent}{dot}{_FUSED_NAME.get(leaf, leaf)}"
