"""Name rules for the sets of linears that serving engines fuse."""

from __future__ import annotations

FUSED_SETS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused name and its members, all children of one parent module."""

_FUSED_NAME = {member: fused for fused, members in FUSED_SETS.items() for member in members}


def unit_name(module_name: str) -> str:
    """Name of the allocation unit of a linear: its fused set's name under the same parent, else its own name.

    ``model.layers.0.self_attn.q_proj`` gives ``model.layers.0.self_attn.qkv_proj``.
    """
    parent, dot, leaf = module_name.rpartition(".")
    return f"{parent}{dot}{_FUSED_NAME.get(leaf, leaf)}"
