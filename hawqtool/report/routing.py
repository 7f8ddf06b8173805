"""How the spread of calibration tokens over experts is put into words, the same at the terminal and in the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median


def routing_text(experts: Mapping[str, Sequence[int]]) -> str | None:
    """Least, median and most calibration tokens per expert; None for a dense model.

    Args:
        experts: Tokens of every expert, by block, as in report.json.
    """
    counts = [count for tokens in experts.values() for count in tokens]
    if not counts:
        return None
    return (
        f"{len(counts)} experts in {len(experts)} blocks; calibration tokens per expert: min {min(counts)}, "
        f"median {median(counts):.0f}, max {max(counts)}"
    )
