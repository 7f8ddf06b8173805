"""What stays as it is: the matrices that are not quantized, why, and how much of the checkpoint they are."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.model.experts_layout import holds_experts
from hawqtool.model.stored_names import Conversion

EMBEDDING = "embedding"
HEAD = "head"
OUTSIDE = "outside the blocks"
ROUTER = "router"
EXPERTS = "experts that stay stacked"
INDEXER = "indexer"
GATE = "small gate"
POSITIONS = "reads distances, not rows"
CONVOLUTION = "convolution"
STATE_SPACE = "state-space parameter"
OWN_FORWARD = "own forward"
SHARED = "shared between blocks"
NOT_CALLED = "not called by these inputs"
CALLED_AGAIN = "called more than once"
USED_OTHERWISE = "weight used outside its layer"
UNDIVIDED = "columns not divisible by any group"
FUSED = "fused with what is kept"
READ_ON_LOADING = "transformers initializes it anew"
ENGINE = "engine keeps it"
CONVERTED = "joined or cut on loading"
UNLOADED = "not loaded by transformers"
UNKNOWN = "unknown matrix"

EXPECTED = (EMBEDDING, HEAD)
"""Reasons that say nothing of a model: every checkpoint has these, and engines load them as they are."""

SMALL_GATES = ("in_proj_a", "in_proj_b", "in_proj_ba")
"""Names of linears that steer the decay of linear attention, exponentially; they weigh nothing, however many rows."""

DISTANCE_LINEARS = ("linear_pos",)
"""Names of linears of conformers that project relative positions: what they see is no row's own."""

_EXPERT_ROLES = ("gate_proj", "up_proj", "down_proj")

LOUD_SHARE = 0.05
"""Share of a checkpoint's bytes, embeddings and head aside, above which keeping is a warning."""

_PROVED_FORWARDS = ("FalconLinear",)
"""Subclasses of linears whose own forward is that of a linear."""


@dataclass(frozen=True)
class KeptTensor:
    """A matrix, or a tensor of more dimensions, that is copied as it is.

    Args:
        reason: Why, in fixed words.
        name: Its name in the checkpoint.
        module: Name of the parameter in the model that transformers builds.
        num_bytes: Stored bytes.
        dimensions: Of its shape.
        block: Number of its block; None outside the blocks.
    """

    reason: str
    name: str
    module: str
    num_bytes: int
    dimensions: int
    block: int | None = None

    @property
    def pattern(self) -> str:
        """The name with ``*`` in place of numbers."""
        return re.sub(r"\b\d+\b", "*", self.name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, by its class."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a linear computes as its base class does; one with a forward of its own may compute anything."""
    forward = type(module).forward
    return forward in (nn.Linear.forward, Conv1D.forward) or type(module).__name__ in _PROVED_FORWARDS


def is_indexer(module: nn.Module) -> bool:
    """Whether a module chooses the positions that attention looks at: no gradient passes through its choice."""
    return type(module).__name__.endswith("Indexer")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, whose weight is a gain."""
    return type(module).__name__.endswith("Norm")  # a gain per head and channel has two dimensions


def use_reason(called: int, used: int) -> str | None:
    """Why a linear is kept that was so often called, and whose weight was so often used; None if once."""
    if called == used == 1:
        return None
    if used == 0:
        return NOT_CALLED
    return CALLED_AGAIN if called == used else USED_OTHERWISE


def kept_tensors(
    model: Any,
    block_names: Sequence[str],
    quantized: set[str],
    reasons: dict[str, str],
    stored: dict[str, str],
    index: CheckpointIndex,
    unused: Container[str],
) -> tuple[KeptTensor, ...]:
    """Every stored matrix of a model that is not quantized, gains of norms aside.

    Args:
        model: Skeleton.
        block_names: Names of its blocks.
        quantized: Names of the linears that are quantized, as the model has them.
        reasons: Why linears and routers of blocks are kept, by the same names.
        stored: See `stored_names`.
        index: The checkpoint.
        unused: Parameters outside the blocks that take no part in a row.
    """
    found: dict[str, KeptTensor] = {}
    head = model.get_output_embeddings()
    modules = dict(model.named_modules(remove_duplicate=False))
    numbers = {name: number for number, name in enumerate(block_names)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place, _, _ = name.rpartition(".")
        owner = modules[place]
        info = index.tensors.get(stored.get(name, name))
        if parameter.ndim < 2 or place in quantized or is_norm(owner) or info is None or info.name in found:
            continue
        position = _block_of(name, numbers)
        if position is None:
            outside = NOT_CALLED if name in unused and owner is not head else _reason(owner, OUTSIDE)
            reason = HEAD if owner is head else outside
        else:
            reason = reasons.get(place) or _reason(owner, UNKNOWN)
        found[info.name] = KeptTensor(reason, info.name, name, info.num_bytes, parameter.ndim, position)
    return (*found.values(), *_unloaded(stored, index))


def as_converted(
    kept: Iterable[KeptTensor], converted: Mapping[str, Conversion], blocks: Sequence[str]
) -> tuple[KeptTensor, ...]:
    """The kept tensors, those as parts of a parameter that transformers makes one of while loading.

    Args:
        kept: See `kept_tensors`.
        converted: How such parameters are made, by name.
        blocks: Names of the blocks.
    """
    made = {stored: parameter for parameter, c in converted.items() for _, stored in c.sources}
    numbers = {name: number for number, name in enumerate(blocks)}
    return tuple(
        replace(t, reason=CONVERTED, module=made[t.name], block=_block_of(made[t.name], numbers))
        if t.name in made
        else t
        for t in kept
    )


def _unloaded(stored: dict[str, str], index: CheckpointIndex) -> Iterator[KeptTensor]:
    """Stored matrices that transformers never loads, such as a draft head's; other engines may."""
    known = set(stored.values())
    for info in index.tensors.values():
        if len(info.shape) > 1 and info.name not in known:
            yield KeptTensor(UNLOADED, info.name, info.name, info.num_bytes, len(info.shape))


def _block_of(name: str, numbers: Mapping[str, int]) -> int | None:
    """Number of the block that a parameter belongs to; None outside of all."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((numbers[prefix] for prefix in prefixes if prefix in numbers), None)


def _reason(owner: nn.Module, otherwise: str) -> str:
    """Why the matrix of a module is kept that is no linear of a block."""
    if isinstance(owner, nn.Embedding):
        return EMBEDDING
    if isinstance(owner, nn.modules.conv._ConvNd):
        return CONVOLUTION
    why = getattr(owner, "why_whole", None)
    if why is not None or holds_experts(owner):
        return EXPERTS if why is None else f"{EXPERTS}: {why}"
    return STATE_SPACE if hasattr(owner, "A_log") else otherwise


def kept_names(kept: Iterable[KeptTensor]) -> tuple[str, ...]:
    """Modules of the kept matrices of two dimensions that engines may take for linears, embeddings aside.

    Where a model's name differs from the stored one, both are listed, because loaders look for either. For experts that
    stay stacked the linears of the first are listed, by which vLLM judges all of a layer.
    """
    names: dict[str, None] = {}
    for tensor in kept:
        both = (tensor.name, tensor.module)
        if tensor.dimensions == 2 and tensor.reason != EMBEDDING and tensor.name.endswith(".weight"):
            names |= dict.fromkeys(name.removesuffix(".weight") for name in both)
        elif tensor.dimensions == 3 and tensor.reason.startswith(EXPERTS):
            places = (name.rpartition(".")[0] for name in both)
            names |= {f"{p}.0.{role}": None for p in places if p.endswith("experts") for role in _EXPERT_ROLES}
    return tuple(names)


def kept_share(kept: Iterable[KeptTensor], index: CheckpointIndex) -> float:
    """Share of the checkpoint's tensor bytes that is kept beside embeddings and head."""
    total = sum(info.num_bytes for info in index.tensors.values())
    return sum(t.num_bytes for t in kept if t.reason not in EXPECTED) / total
