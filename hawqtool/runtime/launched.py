"""What torchrun, or a launcher that sets the same variables, tells a process of itself. Needs no torch."""

from __future__ import annotations

import os

OTHER_GONE = 1
"""Exit code of a process that could not exchange something with another; what started them says so."""


def world_size() -> int:
    """How many processes were started together; 1 without a launcher."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this one among them."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Its number among those of this machine, which is that of its GPU."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
