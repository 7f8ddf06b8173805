"""Names of layers without their place, for tables."""

from __future__ import annotations

import re


def starred(name: str) -> str:
    """A name with each index replaced by a star: ``model.layers.*.mlp.experts.*.w1``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def role(name: str) -> str:
    """What follows the index of the block: ``self_attn.q_proj``, ``mlp.experts.*.w1``."""
    pattern = starred(name)
    return pattern.partition("*.")[2] or pattern
