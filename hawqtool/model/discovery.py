"""Find the linears of a model, what shares an input, and what stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.fusion import VLLM_UNQUANTIZED, VLLM_UNQUANTIZED_HEADS, unit_name
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.errors import InputError, UsageError, one_line
from hawqtool.model.block_list import TRACE_ERRORS
from hawqtool.model.carried.flow import DataFlow
from hawqtool.model.carried.nested import all_nonzero
from hawqtool.model.experts import routers
from hawqtool.model.kept import (
    CONVERTED,
    DISTANCE_LINEARS,
    ENGINE,
    FUSED,
    GATE,
    INDEXER,
    OWN_FORWARD,
    POSITIONS,
    READ_ON_LOADING,
    ROUTER,
    SHARED,
    SMALL_GATES,
    UNDIVIDED,
    KeptTensor,
    as_converted,
    is_indexer,
    is_linear,
    is_plain_linear,
    kept_names,
    kept_tensors,
    use_reason,
)
from hawqtool.model.loading.initialization import initialized_linears, packing_obstacle
from hawqtool.model.replay import Call, ExtraOutputs
from hawqtool.model.stored_names import Conversion, loading_names
from hawqtool.model.trace import Walk, WeightUses, refuse_other_outputs, trace_walk, unused_parameters
from hawqtool.records import BlockSpec, LinearSpec, Unit

_FLOAT_DTYPES = ("BF16", "F16", "F32")
_LEAST_OUTPUTS = 16
"""Linears with fewer outputs are gates: engines keep them as they are, and they weigh nothing."""


@dataclass(frozen=True)
class Structure:
    """What is known of a model from its config and headers alone.

    Args:
        blocks: Blocks in order.
        other_linears: Linears, and matrices that may be taken for some, that stay as they are. Where a model's name
            differs from the stored one, both are listed, because loaders look for either.
        stored_names: Name of a parameter or stored buffer to the name of its tensor in the checkpoint.
        extra_outputs: What blocks return beside the hidden state (see `replayed_blocks`).
        obstacle: Why transformers cannot load packed weights of this model; None where it can.
        head: The output head, where it is to be quantized, as a block of one linear after the last.
        unused: Parameters outside the blocks that take no part in a row, such as the towers of a multimodal model:
            they are copied and never loaded.
        kept: Matrices that stay as they are, with the reasons.
        flow: What blocks hand on where that is more than a hidden state; None where it is one.
        conversions: Parameters and buffers that are no stored tensor as it is.
    """

    blocks: tuple[BlockSpec, ...]
    other_linears: tuple[str, ...]
    stored_names: dict[str, str] = field(default_factory=dict)
    extra_outputs: ExtraOutputs = None
    obstacle: str | None = None
    head: BlockSpec | None = None
    unused: frozenset[str] = frozenset()
    kept: tuple[KeptTensor, ...] = ()
    flow: DataFlow | None = None
    conversions: Mapping[str, Conversion] = field(default_factory=dict)

    @property
    def inside(self) -> tuple[str, ...]:
        """What the names of modules inside of blocks begin with."""
        return tuple(f"{block.name}." for block in self.blocks)

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """Every quantizable linear by name, in call order."""
        blocks = (*self.blocks, self.head) if self.head else self.blocks
        return {spec.name: spec for block in blocks for spec in block.linears}

    @property
    def units(self) -> tuple[Unit, ...]:
        """Allocation units in order."""
        members: dict[str, list[LinearSpec]] = {}
        for spec in self.linears.values():
            members.setdefault(spec.unit, []).append(spec)
        return tuple(Unit(name, tuple(specs)) for name, specs in members.items())

    def without_undivided(self, fits: Callable[[Unit], bool], index: CheckpointIndex) -> Structure:
        """The structure with units of blocks kept that no group divides; unchanged where none would be left.

        Args:
            fits: Whether groups divide all members of a unit.
            index: The checkpoint.
        """
        kept = {unit.name for unit in self.units if not fits(unit)}
        if self.head is not None:
            kept -= {linear.unit for linear in self.head.linears}
        if not kept or len(kept) == len(self.units):
            return self
        dropped = [linear for linear in self.linears.values() if linear.unit in kept]
        tensors = (
            KeptTensor(UNDIVIDED, f"{m.name}.weight", f"{m.module_name}.weight", _num_bytes(m, index), 2, m.block)
            for m in dropped
        )
        names = dict.fromkeys(name for linear in dropped for name in (linear.name, linear.module_name))
        return replace(
            self,
            blocks=tuple(_without_units(spec, kept) for spec in self.blocks),
            other_linears=tuple(dict.fromkeys((*self.other_linears, *names))),
            kept=(*self.kept, *tensors),
        )


def discover(
    model: Any,
    index: CheckpointIndex,
    experts_per_block: bool = False,
    quantize_head: bool = False,
    fuses: bool = True,
    for_transformers: bool = False,
    keeps_names: bool = False,
) -> Structure:
    """Run one row of meta tensors through every block and keep what it proves.

    A linear is quantizable when it computes as its class does, is called exactly once, its weight takes part in one
    operation only, is shared with nothing, and is stored as one tensor. Every other matrix is kept, with a reason.
    Input groups are found by the identity of the input tensor, held while comparing.

    Args:
        model: Skeleton; its buffers are lost here, so it is of no further use.
        index: The checkpoint.
        experts_per_block: As in `unit_name`.
        quantize_head: Whether the output head is quantized too.
        fuses: As in `unit_name`.
        for_transformers: Whether linears that transformers cannot load packed are kept.
        keeps_names: Whether quantized layers have a tensor of the weight's name, so that loading may read it.

    Raises:
        InputError: If the blocks cannot be run, or hand on more than a hidden state; if a tensor is missing.
        UsageError: If the head is to be quantized and cannot be.
    """
    walk = trace_walk(model)
    blocks = [model.get_submodule(name) for name in walk.names]
    stored, converted = loading_names(model, walk.names, index)
    unused = unused_parameters(model, walk.names, walk.replaced)
    _refuse_missing(model, stored, index, {*unused, *converted})
    shared, chosen = _shared_weights(model), routers(model)
    known = (stored, index, shared, chosen, converted.keys())
    contexts = [_BlockContext(i, name, *known) for i, name in enumerate(walk.names)]
    specs, reasons = _discover_blocks(walk, contexts, blocks)
    modules = [m.module_name for spec in specs for m in spec.linears] + list(reasons)
    tensors = {n: stored.get(f"{n}.weight", f"{n}.weight").removesuffix(".weight") for n in modules}
    siblings = frozenset(tensors.values())
    units = {n: unit_name(tensor, siblings, experts_per_block, fuses) for n, tensor in tensors.items()}
    reasons |= {n: ENGINE for n, tensor in tensors.items() if fuses and VLLM_UNQUANTIZED.search(tensor)} | reasons
    specs = [_with_units(spec, units) for spec in specs]
    read = initialized_linears(model, [m.module_name for spec in specs for m in spec.linears])
    keeps = for_transformers and {units[n] for n in read} < {m.unit for spec in specs for m in spec.linears}
    reasons |= dict.fromkeys(read if keeps else (), READ_ON_LOADING)
    reasons = _kept_along(specs, {units[n] for n in reasons}) | reasons
    specs = [_without_units(spec, {units[n] for n in reasons}) for spec in specs]
    obstacle = packing_obstacle(blocks, bool(read) and not (keeps or keeps_names))
    head = _head(model, len(blocks), stored, index, fuses) if quantize_head else None
    walked = (*specs, head) if head else specs
    inside = {spec.module_name for block in walked for spec in block.linears}
    others = [n for n, m in model.named_modules() if (is_linear(m) or n in chosen) and n not in inside]
    pairs = (name for n in others for name in (stored.get(f"{n}.weight", f"{n}.weight").removesuffix(".weight"), n))
    kept = kept_tensors(model, walk.names, inside, reasons | dict.fromkeys(chosen, ROUTER), stored, index, unused)
    kept = as_converted(kept, converted, walk.names)
    ignored = tuple(dict.fromkeys((*pairs, *kept_names(kept))))
    return Structure(
        tuple(specs), ignored, stored, walk.extra_outputs, obstacle, head, unused, kept, walk.flow, converted
    )


def _kept_along(specs: Sequence[BlockSpec], units: set[str]) -> dict[str, str]:
    """Reasons for linears with too few outputs, and for all that engines fuse with what is kept, by module name."""
    linears = [linear for spec in specs for linear in spec.linears]
    narrow = {linear.unit for linear in linears if _is_gate(linear)}
    return {
        linear.module_name: GATE if _is_gate(linear) else FUSED for linear in linears if linear.unit in narrow | units
    }


def _is_gate(linear: LinearSpec) -> bool:
    """Whether a linear steers a gate: it has few outputs, or its name says so."""
    return linear.out_features < _LEAST_OUTPUTS or linear.name.rpartition(".")[2] in SMALL_GATES


def _head(model: Any, position: int, stored: dict[str, str], index: CheckpointIndex, fuses: bool) -> BlockSpec:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UsageError(f"--quantize-lm-head: {type(model).__name__} has no linear output head; drop the flag")
    if fuses and type(model).__name__ in VLLM_UNQUANTIZED_HEADS:
        raise UsageError(
            f"--quantize-lm-head: vLLM does not quantize the head of {type(model).__name__}; drop the flag or use "
            "--profile transformers"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    # Loaders tie a head that has no plain weight, so one that is stored apart counts as tied too.
    if f"{name}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
        raise UsageError(
            "--quantize-lm-head: config.json ties the head to the input embedding, which loaders need unquantized; "
            "drop the flag"
        )
    context = _BlockContext(position, "", stored, index, set(), set())
    return BlockSpec(position, "", ((_linear_spec(name, head, context),),))


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules share."""
    owners: dict[int, str] = {}
    shared = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if owners.setdefault(id(parameter), name) != name:
            shared.add(id(parameter))
    return shared


def _refuse_missing(model: nn.Module, stored: dict[str, str], index: CheckpointIndex, unused: Container[str]) -> None:
    """Refuse a model of which the checkpoint lacks a parameter; what is shared needs one of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for places in names.values():
        if not any(stored.get(name, name) in index.tensors or name in unused for name in places):
            raise InputError(
                f"{places[0]} is not in the checkpoint as one tensor under a name that transformers knows; "
                "this way of storing the model is not supported"
            )


@dataclass(frozen=True)
class _BlockContext:
    """What discovery knows of a block beside its module.

    Args:
        position: Its number.
        name: Its name in the model.
        stored: See `stored_names`.
        index: The checkpoint.
        shared: Identities of the parameters that several modules share.
        routers: Names of the modules that choose experts.
        converted: Names of the parameters that are no stored tensor as it is.
    """

    position: int
    name: str
    stored: dict[str, str]
    index: CheckpointIndex
    shared: set[int]
    routers: set[str]
    converted: Container[str] = ()


def _discover_blocks(
    walk: Walk, contexts: Sequence[_BlockContext], blocks: Sequence[nn.Module]
) -> tuple[list[BlockSpec], dict[str, str]]:
    """The blocks' input groups, and why linears are kept, by their names in the model."""
    specs, reasons = [], dict[str, str]()
    for context, block, call in zip(contexts, blocks, walk.calls, strict=True):
        spec, kept, output = _discover_block(context, block, call)
        if walk.flow is None:
            refuse_other_outputs(context.name, output, walk.extra_outputs)
        specs.append(spec)
        reasons |= kept
    return specs, reasons


def _discover_block(context: _BlockContext, block: nn.Module, call: Call) -> tuple[BlockSpec, dict[str, str], Any]:
    """The block's input groups, why linears of it are kept, by their names in the model, and its output."""
    chosen = {n.removeprefix(f"{context.name}.") for n in context.routers}
    linears: dict[str, Any] = {n: m for n, m in block.named_modules() if is_linear(m) and n not in chosen}
    shared = {n for n, m in linears.items() if id(m.weight) in context.shared}
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, inputs, n=n: seen.append((n, inputs[0])))
        for n, module in linears.items()
    ]
    block.to("meta")
    uses = WeightUses({id(m.weight): n for n, m in linears.items()})
    try:
        with torch.no_grad(), uses, all_nonzero():
            output = block(*call[0], **call[1])
    except TRACE_ERRORS as error:
        raise InputError(
            f"{context.name} cannot be run without data ({one_line(error)}); this architecture is not supported"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    times, reasons = Counter(n for n, _ in seen), {}
    indexers = tuple(f"{n}." for n, m in block.named_modules() if is_indexer(m))
    for linear, module in linears.items():
        own = INDEXER if linear.startswith(indexers) else None if is_plain_linear(module) else OWN_FORWARD
        own = POSITIONS if linear.rpartition(".")[2] in DISTANCE_LINEARS else own
        own = CONVERTED if f"{context.name}.{linear}.weight" in context.converted else own
        reason = SHARED if linear in shared else own or use_reason(times[linear], uses.counts[linear])
        if reason is not None:
            reasons[linear] = reason
    groups: list[tuple[Tensor, list[LinearSpec]]] = []
    for linear, tensor in seen:
        if linear in reasons:
            continue
        spec = _linear_spec(f"{context.name}.{linear}", linears[linear], context)
        for held, members in groups:
            if held is tensor:
                members.append(spec)
                break
        else:
            groups.append((tensor, [spec]))
    named = {f"{context.name}.{linear}": reason for linear, reason in reasons.items()}
    return BlockSpec(context.position, context.name, tuple(tuple(members) for _, members in groups)), named, output


def _linear_spec(module_name: str, module: Any, context: _BlockContext) -> LinearSpec:
    position, index = context.position, context.index
    tensor = context.stored.get(f"{module_name}.weight")
    if tensor is None:
        raise InputError(
            f"{module_name}.weight is not in the checkpoint as one tensor under a name that transformers knows; "
            "this way of storing the model is not supported"
        )
    info = index.tensors[tensor]
    if info.dtype not in _FLOAT_DTYPES:
        raise InputError(f"{info.name} is stored as {info.dtype}; expected one of {', '.join(_FLOAT_DTYPES)}")
    if info.shape != tuple(module.weight.shape):
        raise InputError(
            f"{info.name} has shape {info.shape} in the file, config.json implies {tuple(module.weight.shape)}"
        )
    transposed = isinstance(module, Conv1D)
    out_features, in_features = reversed(info.shape) if transposed else info.shape
    name = tensor.removesuffix(".weight")
    module_alias = None if module_name == name else module_name
    return LinearSpec(
        name, out_features, in_features, position, unit_name(name), DTYPE_BYTES[info.dtype], module_alias, transposed
    )


def _with_units(spec: BlockSpec, units: Mapping[str, str]) -> BlockSpec:
    """The block with its linears in other allocation units, by the name of the linear's module."""
    groups = tuple(tuple(replace(m, unit=units[m.module_name]) for m in group) for group in spec.input_groups)
    return replace(spec, input_groups=groups)


def _without_units(spec: BlockSpec, kept: set[str]) -> BlockSpec:
    """The block without some units."""
    groups = (tuple(linear for linear in group if linear.unit not in kept) for group in spec.input_groups)
    return replace(spec, input_groups=tuple(filter(None, groups)))


def _num_bytes(linear: LinearSpec, index: CheckpointIndex) -> int:
    return index.tensors[f"{linear.name}.weight"].num_bytes


def check_shapes(model: nn.Module, structure: Structure, index: CheckpointIndex) -> None:
    """Compare every parameter of the model with the checkpoint's header.

    Raises:
        InputError: Naming the first tensor whose shape is not the one that config.json implies.
    """
    for name, parameter in model.named_parameters():
        info = index.tensors.get(structure.stored_names.get(name, name))
        if info is not None and info.shape != tuple(parameter.shape) and name not in structure.conversions:
            raise InputError(
                f"{info.name} has shape {info.shape} in the file, config.json implies {tuple(parameter.shape)}; "
                "expected a config.json and weights of one model; download them again"
            )
