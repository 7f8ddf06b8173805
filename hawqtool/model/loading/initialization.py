"""What a model's own initialization does, which transformers calls while loading.

It reads linears, which stops it at packed ones, and computes parameters that no checkpoint holds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.model.stored_names import stored_names

INITIALIZED = (
    "its own initialization, which loading calls, stops at packed layers; --formats fp8 stores 8 bits under the "
    "weights' own names, which it loads"
)
"""Why transformers cannot load a model whose linears are all read by its initialization."""

_OBSTACLES = {
    "Conv1D": "it skips packed Conv1D layers and would run on random weights",
    "FalconLinear": "its Falcon code stops at packed layers",
}
"""Classes of linears that transformers 5.17 with compressed-tensors 0.18 was seen to fail on."""


def packing_obstacle(blocks: Iterable[nn.Module], initialized: bool) -> str | None:
    """Why transformers cannot load packed layers of some blocks; None where it can.

    Args:
        blocks: The blocks.
        initialized: Whether initialization stops at packed layers (see `initialized_linears`).
    """
    parts = (kind.__name__ for block in blocks for module in block.modules() for kind in type(module).__mro__)
    return next((_OBSTACLES[name] for name in parts if name in _OBSTACLES), INITIALIZED if initialized else None)


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


def compute_unstored(model: Any, tensors: Iterable[str]) -> None:
    """Put parameters in place that a checkpoint lacks by design, such as sine tables of positions, as buffers.

    Those are meant that the class names as missing and that its initialization sets to one value whatever was there;
    what it draws at random stays missing.

    Args:
        model: Skeleton.
        tensors: Names in the checkpoint.
    """
    patterns = tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    stored = stored_names(model, tensors) if patterns else {}
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for names in places.values():
        if patterns and not any(name in stored for name in names) and re.search("|".join(patterns), names[0]):
            owner, _, leaf = names[0].rpartition(".")
            _compute(model, model.get_submodule(owner), leaf)


def _compute(model: Any, owner: nn.Module, leaf: str) -> None:
    """Make a parameter a buffer with the value that initialization gives it, where it gives one."""
    parameter, found = owner._parameters[leaf], list[Tensor]()
    assert parameter is not None
    for filler in (0.0, 1.0):
        filled = torch.full(parameter.shape, filler, dtype=parameter.dtype, device="cpu")
        owner._parameters[leaf] = nn.Parameter(filled, requires_grad=False)
        vars(owner).pop("_is_hf_initialized", None)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(filler))
            model._init_weights(owner)
        found.append(owner._parameters[leaf].detach())  # type: ignore[union-attr]
    if torch.equal(*found):
        del owner._parameters[leaf]
        owner.register_buffer(leaf, found[0], persistent=False)
    else:
        owner._parameters[leaf] = parameter


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
