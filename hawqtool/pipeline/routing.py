"""How the calibration tokens of a run spread over the experts of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hawqtool.model.units import expert_of


def routed_tokens(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Calibration tokens that the router sent to every expert, by block; empty for dense models.

    Args:
        layers: Metrics by layer, as in report.json.

    Returns:
        Name such as ``model.layers.0.mlp.experts`` to the tokens of expert 0, 1, ...
    """
    found: dict[str, dict[int, int]] = {}
    for name, metrics in layers.items():
        expert = expert_of(name)
        if expert:
            found.setdefault(expert[0], {})[expert[1]] = metrics["num_tokens"]
    return {name: [tokens[number] for number in sorted(tokens)] for name, tokens in found.items()}


def routing_warnings(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line on the experts that lacked calibration tokens, one on those that saw none at all."""
    counts = routed_tokens(layers)
    total = sum(map(len, counts.values()))
    lacking = dict.fromkeys(expert_of(name) for name, metrics in layers.items() if metrics["fallback"])
    unseen = [(name, number) for name, tokens in counts.items() for number, count in enumerate(tokens) if not count]
    warnings = []
    if lacking:
        warnings.append(
            f"{len(lacking)} of {total} experts (first {_first(lacking)}) were routed fewer calibration tokens than "
            "they have input columns, so tokens that were routed to other experts filled up their statistics; more "
            "calibration rows help"
        )
    if unseen:
        warnings.append(
            f"{len(unseen)} of {total} experts (first {_first(unseen)}) were routed no calibration token at all; they "
            "were rounded by the statistics of other experts' tokens alone"
        )
    return warnings


def _first(experts: Any) -> str:
    return ".".join(map(str, next(iter(experts))))
