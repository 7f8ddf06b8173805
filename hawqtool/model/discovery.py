"""Find the linears of a model, what shares an input, and what cannot be quantized."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.fusion import is_expert, unit_name
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.errors import InputError, UsageError, one_line
from hawqtool.model.block_list import TRACE_ERRORS, example_row, find_blocks, run_on_zeros
from hawqtool.model.experts import routers
from hawqtool.model.replay import Call, replayed_blocks
from hawqtool.model.stored_names import stored_names
from hawqtool.records import BlockSpec, LinearSpec, Unit

_FLOAT_DTYPES = ("BF16", "F16", "F32")
_TRANSPOSES = (Tensor.T, Tensor.mT, Tensor.H)
_LEAST_OUTPUTS = 16
"""Linears with fewer outputs are gates: engines keep them as they are, and they weigh nothing."""

_RETURN_ATTENTION = ("GPTJBlock",)
"""Blocks that return attention probabilities, which nothing reads; elsewhere a second tensor may feed another block."""

_OBSTACLES = {
    "Conv1D": "it skips packed Conv1D layers and would run on random weights",
    "FalconLinear": "its Falcon code stops at packed layers",
}
"""Classes of linears that transformers 5.17 with compressed-tensors 0.18 was seen to fail on."""


@dataclass(frozen=True)
class Structure:
    """What is known of a model from its config and headers alone.

    Args:
        blocks: Blocks in order.
        other_linears: Linears that stay as they are: outside the blocks, gates and routers. Where a model's name
            differs from the stored one, both are listed, because loaders look for either.
        stored_names: Parameter name to the name of its tensor in the checkpoint.
        extra_outputs: What blocks return beside the hidden state (see `replayed_blocks`).
        obstacle: Why transformers cannot load packed weights of this model; None where it can.
        head: The output head, where it is to be quantized, as a block of one linear after the last.
        unused: Parameters outside the blocks that take no part in a row, such as the towers of a multimodal model:
            they are copied and never loaded.
    """

    blocks: tuple[BlockSpec, ...]
    other_linears: tuple[str, ...]
    stored_names: dict[str, str] = field(default_factory=dict)
    extra_outputs: int | None = None
    obstacle: str | None = None
    head: BlockSpec | None = None
    unused: frozenset[str] = frozenset()

    @property
    def blocks_name(self) -> str:
        """Module name of the list of blocks."""
        return self.blocks[0].name.rpartition(".")[0]

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


class _WeightUses(TorchFunctionMode):
    """Counts the operations that each watched parameter takes part in."""

    def __init__(self, watched: dict[int, str]) -> None:
        super().__init__()
        self.watched, self.counts = watched, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Reading .dtype or .device is not a use, reading the transpose is one.
        if getattr(func, "__name__", "") != "__get__" or getattr(func, "__self__", None) in _TRANSPOSES:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self.watched:
                    self.counts[self.watched[id(leaf)]] += 1
        return func(*args, **kwargs)


def discover(
    model: Any,
    index: CheckpointIndex,
    experts_per_block: bool = False,
    quantize_head: bool = False,
    fuses: bool = True,
) -> Structure:
    """Run one row of meta tensors through every block and keep what it proves.

    A linear is quantizable when it is called exactly once, its weight takes part in one operation only, is
    shared with nothing, and is stored as one tensor. Every other parameter of a block must have one dimension or
    belong to a router. Input groups are found by the identity of the input tensor, held while comparing.

    Args:
        model: Skeleton; its buffers are lost here, so it is of no further use.
        index: The checkpoint.
        experts_per_block: As in `unit_name`.
        quantize_head: Whether the output head is quantized too.
        fuses: As in `unit_name`.

    Raises:
        InputError: Naming the first layer that fails, with the reason.
        UsageError: If the head is to be quantized and cannot be.
    """
    name, blocks = find_blocks(model)
    for position, block in enumerate(blocks):
        _refuse_other_matrices(f"{name}.{position}", block)
    _refuse_shared_weights(model, name)
    calls, extra_outputs = _block_calls(model, blocks)
    stored = stored_names(model, index.tensors)
    specs = [
        _discover_block(position, f"{name}.{position}", block, _on_meta(calls[position]), stored, index)
        for position, block in enumerate(blocks)
    ]
    units = {n: unit_name(n, experts_per_block, fuses) for spec in specs for n in (m.name for m in spec.linears)}
    specs = [_without_narrow(_with_units(spec, units)) for spec in specs]
    obstacle = next((text for m in blocks.modules() for kind, text in _OBSTACLES.items() if kind in _classes(m)), None)
    obstacle = obstacle or _initialization_obstacle(model, [m.module_name for spec in specs for m in spec.linears])
    head = _head(model, len(blocks), stored, index) if quantize_head else None
    walked = (*specs, head) if head else specs
    inside = {spec.module_name for block in walked for spec in block.linears}
    chosen = routers(model)
    others = [n for n, m in model.named_modules() if (_is_linear(m) or n in chosen) and n not in inside]
    names = [(stored.get(f"{n}.weight", f"{n}.weight").removesuffix(".weight"), n) for n in others]
    kept = tuple(dict.fromkeys([*(name for pair in names for name in pair), *_unknown_matrices(stored, index)]))
    unused = _unused(model, blocks, name, extra_outputs)
    return Structure(tuple(specs), kept, stored, extra_outputs, obstacle, head, unused)


def _unknown_matrices(stored: dict[str, str], index: CheckpointIndex) -> Iterator[str]:
    """Modules of stored matrices that transformers never loads, such as a draft head's; other engines may."""
    known = set(stored.values())
    for info in index.tensors.values():
        if info.name.endswith(".weight") and len(info.shape) == 2 and info.name not in known:
            yield info.name.removesuffix(".weight")


def _unused(model: Any, blocks: nn.ModuleList, blocks_name: str, extra_outputs: int | None) -> frozenset[str]:
    """Parameters outside the blocks that no operation on a row takes; none where that cannot be told without data."""
    outside = {n: p for n, p in model.named_parameters() if not n.startswith(f"{blocks_name}.")}
    uses = _WeightUses({id(parameter): name for name, parameter in outside.items()})
    model.to("meta")
    with replayed_blocks(blocks, extra_outputs), torch.no_grad(), uses:
        try:
            model(**{model.main_input_name: example_row(model).to("meta")})
        except TRACE_ERRORS:
            return frozenset()
    return frozenset(name for name in outside if not uses.counts[name])


def _initialization_obstacle(model: Any, packed: list[str]) -> str | None:
    """Why transformers cannot load packed layers whose weight the model's own initialization touches.

    Loading ends with a call of that code for every module, and a packed layer has no ``weight``. On meta tensors the
    same call takes no time.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    probe = copy.deepcopy(model)
    for name in packed:
        if not is_expert(name):  # transformers has the experts of a block in one module
            probe.get_submodule(name)._parameters.pop("weight", None)
    for module in probe.modules():
        vars(module).pop("_is_hf_initialized", None)  # building it has called the code already
    try:
        probe.initialize_weights()
    except AttributeError as error:
        if "weight" in str(error):
            return f"its own initialization, which loading calls, stops at packed layers ({error})"
    return None


def _head(model: Any, position: int, stored: dict[str, str], index: CheckpointIndex) -> BlockSpec:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UsageError(f"--quantize-lm-head: {type(model).__name__} has no linear output head; drop the flag")
    name = next(name for name, module in model.named_modules() if module is head)
    # Loaders tie a head that has no plain weight, so one that is stored apart counts as tied too.
    if f"{name}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
        raise UsageError(
            "--quantize-lm-head: config.json ties the head to the input embedding, which loaders need unquantized; "
            "drop the flag"
        )
    return BlockSpec(position, "", ((_linear_spec(name, head, position, stored, index),),))


def _classes(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, whose weight is a gain."""
    return type(module).__name__.endswith("Norm")  # a gain per head and channel has two dimensions


def _on_meta(call: Call) -> Call:
    moved: Call = tree_map_only(Tensor, lambda t: t.to("meta"), call)
    return moved


def _block_calls(model: Any, blocks: nn.ModuleList) -> tuple[list[Call], int | None]:
    """Arguments of every block's call, and what blocks return beside the hidden state."""
    calls, error = _record_calls(model, blocks, None)
    if not calls:
        raise InputError(
            f"{type(model).__name__}: the part before the blocks cannot be traced: {str(error).splitlines()[0]}"
        ) from error
    args, kwargs = _on_meta(calls[0])
    try:
        with torch.no_grad():
            output = blocks[0].to("meta")(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as raised:
        raise InputError(
            f"{type(model).__name__}: block 0 cannot be run as config.json describes it ({one_line(raised)}); "
            "check its sizes, such as num_key_value_heads"
        ) from raised
    extra = len(output) - 1 if isinstance(output, tuple) else None
    unread = type(blocks[0]).__name__ in _RETURN_ATTENTION
    if not unread and any(isinstance(value, Tensor) for value in (output[1:] if extra else ())):
        raise InputError(f"{type(model).__name__}: blocks hand on more than a hidden state; not supported")
    calls, error = _record_calls(model, blocks, extra)
    if error is not None or len(calls) != len(blocks):
        reason = f": {str(error).splitlines()[0]}" if error else ""
        raise InputError(
            f"{type(model).__name__}: {len(calls)} of {len(blocks)} blocks can be traced{reason}; not supported"
        ) from error
    if any(after[0][0] is not before[0][0] for before, after in pairwise(calls)):
        raise InputError(f"{type(model).__name__}: hidden states are changed between blocks; not supported")
    return calls, extra


def _record_calls(model: Any, blocks: nn.ModuleList, extra_outputs: int | None) -> tuple[list[Call], Exception | None]:
    with replayed_blocks(blocks, extra_outputs, ends=True) as calls:
        try:
            run_on_zeros(model)
        except TRACE_ERRORS as error:
            return calls, error
    return calls, None


def _refuse_shared_weights(model: nn.Module, blocks_name: str) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and (name.startswith(blocks_name) or first.startswith(blocks_name)):
            raise InputError(f"{name} shares its weight with {first}; shared block weights are not supported")


def _refuse_other_matrices(name: str, block: nn.Module) -> None:
    chosen = routers(block)
    known = {f"{n}.weight" for n, m in block.named_modules() if _is_linear(m) or n in chosen or is_norm(m)}
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim >= 2 and parameter_name not in known:
            raise InputError(
                f"{name}.{parameter_name} has shape {tuple(parameter.shape)} and is no linear layer's weight; "
                "blocks with such parameters are not supported"
            )


def _discover_block(
    position: int, name: str, block: nn.Module, call: Call, stored: dict[str, str], index: CheckpointIndex
) -> BlockSpec:
    chosen = routers(block)
    linears: dict[str, Any] = {n: m for n, m in block.named_modules() if _is_linear(m) and n not in chosen}
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, inputs, n=n: seen.append((n, inputs[0])))
        for n, module in linears.items()
    ]
    block.to("meta")
    uses = _WeightUses({id(m.weight): n for n, m in linears.items()})
    try:
        with torch.no_grad(), uses:
            block(*call[0], **call[1])
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(n for n, _ in seen)
    for linear in linears:
        if times[linear] != 1 or uses.counts[linear] != 1:
            raise InputError(
                f"{name}.{linear} is called {times[linear]} times and its weight is used {uses.counts[linear]} times "
                "in one pass; only layers that are used exactly once are supported"
            )
    groups: list[tuple[Tensor, list[LinearSpec]]] = []
    for linear, tensor in seen:
        spec = _linear_spec(f"{name}.{linear}", linears[linear], position, stored, index)
        for held, members in groups:
            if held is tensor:
                members.append(spec)
                break
        else:
            groups.append((tensor, [spec]))
    return BlockSpec(position, name, tuple(tuple(members) for _, members in groups))


def _linear_spec(
    module_name: str, module: Any, position: int, stored: dict[str, str], index: CheckpointIndex
) -> LinearSpec:
    tensor = stored.get(f"{module_name}.weight")
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


def _with_units(spec: BlockSpec, units: dict[str, str]) -> BlockSpec:
    """The block with its linears in other allocation units, by the name of the linear."""
    groups = tuple(tuple(replace(linear, unit=units[linear.name]) for linear in group) for group in spec.input_groups)
    return replace(spec, input_groups=groups)


def _without_narrow(spec: BlockSpec) -> BlockSpec:
    """The block without gates; whatever an engine fuses with one stays as it is too, for it is stored in one format."""
    narrow = {linear.unit for linear in spec.linears if linear.out_features < _LEAST_OUTPUTS}
    groups = (tuple(linear for linear in group if linear.unit not in narrow) for group in spec.input_groups)
    return replace(spec, input_groups=tuple(filter(None, groups)))


def check_shapes(model: nn.Module, structure: Structure, index: CheckpointIndex) -> None:
    """Compare every parameter of the model with the checkpoint's header.

    Raises:
        InputError: Naming the first tensor whose shape is not the one that config.json implies.
    """
    for name, parameter in model.named_parameters():
        info = index.tensors.get(structure.stored_names.get(name, name))
        if info is not None and info.shape != tuple(parameter.shape):
            raise InputError(
                f"{info.name} has shape {info.shape} in the file, config.json implies {tuple(parameter.shape)}; "
                "expected a config.json and weights of one model; download them again"
            )
