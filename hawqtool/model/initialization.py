"""Linears that a model's own initialization reads: transformers calls it while loading, and packed layers stop it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hawqtool.checkpoint.fusion import is_expert

INITIALIZED = "its own initialization, which loading calls, stops at packed layers"
"""Why transformers cannot load a model whose linears are all read by its initialization."""


def initialized_linears(model: Any, linears: Iterable[str]) -> frozenset[str]:
    """Linears whose weight the model's own initialization reads, which a packed layer does not have.

    Loading ends with a call of that code for every module. On meta tensors the same call takes no time.

    Args:
        model: Skeleton.
        linears: Names of the linears that are to be packed.

    Returns:
        Those of the linears that must keep their weight, with all whose names differ in numbers only.
    """
    if not isinstance(model, PreTrainedModel):
        return frozenset()
    probe = copy.deepcopy(model)
    weights: dict[str, Any] = {}
    reads: list[str] = []
    for name in linears:
        if not is_expert(name):  # transformers has the experts of a block in one module
            weights[name] = _without_weight(probe.get_submodule(name), name, reads)
    for module in probe.modules():
        vars(module).pop("_is_hf_initialized", None)  # building it has called the code already
    found: set[str] = set()
    while len(found) < len(weights) and _stops(probe):
        alike = [name for name in weights if _pattern(name) == _pattern(reads[-1])]
        for name in alike:
            probe.get_submodule(name)._parameters["weight"] = weights[name]
        found.update(alike)
    return frozenset(found)


def _without_weight(linear: nn.Module, name: str, reads: list[str]) -> nn.Parameter | None:
    """Take a linear's weight away; attempts to read it append its name to a list. Returns the weight."""
    kind: Any = type(linear)

    def getter(self: Any, attribute: str) -> Any:
        if attribute == "weight" and "weight" not in self._parameters:
            reads.append(name)
        return kind.__getattr__(self, attribute)

    linear.__class__ = type(kind.__name__, (kind,), {"__getattr__": getter})
    return linear._parameters.pop("weight")


def _stops(probe: Any) -> bool:
    """Whether the initialization stops at a weight that is not there."""
    try:
        probe.initialize_weights()
    except AttributeError as error:
        return "weight" in str(error)
    return False


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)
