"""Trace the calls of a model's blocks by what the model runs around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hawqtool.errors import InputError, one_line
from hawqtool.model.block_list import TOKENS, TRACE_ERRORS, example_row, find_blocks, run_on_zeros
from hawqtool.model.carried.flow import DataFlow, trace_flow, with_zeros
from hawqtool.model.carried.nested import all_nonzero, mappings
from hawqtool.model.carried.nested import on_meta as on_meta_once
from hawqtool.model.inputs.arguments import model_inputs
from hawqtool.model.replay import Call, ExtraOutputs, replayed_blocks
from hawqtool.model.tasks import feeds_decoder, has_two_towers, model_images

_TRANSPOSES = (Tensor.T, Tensor.mT, Tensor.H)


class NotPlain(Exception):
    """The blocks of a model do not hand on a hidden state alone, from each to the next."""


class WeightUses(TorchFunctionMode):
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


class _ZeroUses(WeightUses):
    """The same where all watched parameters are zeros: a product with a large vocabulary of them needs no seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and len(args) > 1 and id(args[1]) in self.watched:
            func = _zero_product
        return super().__torch_function__(func, types, args, kwargs)


def _zero_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + b for a W of zeros."""
    product = x.new_zeros(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


def on_meta(call: Call) -> Call:
    """The call with its tensors on the meta device."""
    moved: Call = tree_map_only(Tensor, lambda t: t.to("meta"), call)
    return moved


def block_calls(model: Any, blocks: nn.ModuleList) -> tuple[list[Call], ExtraOutputs]:
    """Arguments of every block's call, and what blocks return beside the hidden state, which nothing may read.

    Raises:
        NotPlain: If blocks hand on something else, or not from each to the next.
        InputError: If the first block cannot be run.
    """
    kind = type(model).__name__
    calls, error, _ = _record_calls(model, blocks, None)
    if not calls:
        raise InputError(
            f"{kind}: the part before the blocks cannot be traced: {str(error).splitlines()[0]}"
        ) from error
    first = calls[0][0][0].shape
    if first[0] != 1 or (model.main_input_name == "input_ids" and len(first) == 3 and first[1] != TOKENS):
        raise NotPlain  # rows do not come first, or positions are no tokens
    args, kwargs = on_meta(calls[0])
    try:
        with torch.no_grad():
            output = blocks[0].to("meta")(*args, **kwargs)
    except TRACE_ERRORS as raised:
        if "meta tensor" in str(raised):
            raise InputError(
                f"{kind}: block 0 cannot be run without data ({one_line(raised)}); this architecture is not supported"
            ) from raised
        raise InputError(
            f"{kind}: block 0 cannot be run as config.json describes it ({one_line(raised)}); "
            "check its sizes, such as num_key_value_heads"
        ) from raised
    extra = extra_outputs_of(output)
    calls, error, _ = _record_calls(model, blocks, extra)
    if error is not None or len(calls) != len(blocks):
        raise NotPlain from error
    if any(after[0][0] is not before[0][0] for before, after in pairwise(calls)):
        raise NotPlain
    if any(extra or ()) and _reads_more(model, blocks, extra):
        raise NotPlain
    if any(_writes(block, call) for block, call in zip(blocks, calls, strict=True)):
        raise NotPlain
    if model.main_input_name == "pixel_values" and any(map(_reshapes, blocks, calls)):
        raise NotPlain
    return calls, extra


def _reshapes(block: nn.Module, call: Call) -> bool:
    """Whether a block gives hidden states of another shape, as stages of image models do."""
    args, kwargs = on_meta(call)
    with torch.no_grad():
        try:
            output = block.to("meta")(*args, **kwargs)
        except TRACE_ERRORS:
            return True
    first = output[0] if isinstance(output, tuple) else output
    return bool(first.shape != args[0].shape)


def _writes(block: nn.Module, call: Call) -> bool:
    """Whether a block changes a mapping among its arguments, in which later blocks may read."""
    args, kwargs = on_meta_once(call)
    held = [(mapping, dict(mapping)) for mapping in mappings((args, kwargs))]
    if len(held) < 2:  # the keyword arguments themselves
        return False
    with torch.no_grad():
        try:
            block.to("meta")(*args, **kwargs)
        except TRACE_ERRORS:
            return True
    return any(
        mapping.keys() != before.keys() or any(mapping[k] is not before[k] for k in before) for mapping, before in held
    )


def _reads_more(model: Any, blocks: nn.ModuleList, extra_outputs: ExtraOutputs) -> bool:
    """Whether something reads more of a block than the hidden state: NaN stands for the rest."""
    calls, _, result = _record_calls(model, blocks, extra_outputs, ends=False)
    values = (dict(seen) if isinstance(seen, Mapping) else seen for seen in [*calls, result])
    return any(_has_nan(leaf) for seen in values for leaf in tree_leaves(seen))


def extra_outputs_of(output: Any) -> ExtraOutputs:
    """Which of the values beside the hidden state that a block returns hold tensors."""
    if not isinstance(output, tuple):
        return None
    return tuple(any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)) for value in output[1:])


def _has_nan(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any())


def _record_calls(
    model: Any, blocks: nn.ModuleList, extra_outputs: ExtraOutputs, ends: bool = True
) -> tuple[list[Call], Exception | None, Any]:
    """The calls of all blocks as far as they go, the error that ended them, and what the model gives, if it ends."""
    result = None
    with replayed_blocks(blocks, extra_outputs, ends=ends) as calls:
        try:
            result = run_on_zeros(model)
        except TRACE_ERRORS as error:
            return calls, error, None
    return calls, None, result


@dataclass(frozen=True)
class Walk:
    """How the blocks of a model are run one after the other.

    Args:
        names: Names of the blocks in order.
        calls: Arguments of their calls on the meta device.
        replaced: A context in which something stands in for the blocks.
        extra_outputs: What blocks return beside the hidden state, which nothing reads.
        flow: What blocks hand on where that is more than a hidden state; None where it is one.
    """

    names: tuple[str, ...]
    calls: list[Call]
    replaced: AbstractContextManager[Any]
    extra_outputs: ExtraOutputs = None
    flow: DataFlow | None = None


@all_nonzero()
def trace_walk(model: Any) -> Walk:
    """How the blocks of a skeleton are run, found by running rows of zeros.

    Raises:
        InputError: If its blocks cannot be run, or hand on what cannot be carried.
    """
    if not feeds_decoder(model) and not has_two_towers(model) and model_images(model) is None:
        name, blocks = find_blocks(model)
        try:
            calls, extra = block_calls(model, blocks)
        except NotPlain:
            pass
        else:
            names = tuple(f"{name}.{position}" for position in range(len(blocks)))
            return Walk(names, [on_meta(call) for call in calls], replayed_blocks(blocks, extra), extra)
    flow, traced = trace_flow(model)
    calls = [on_meta_once(block.call) for block in traced.blocks]
    return Walk(flow.names, calls, with_zeros(model, traced), None, flow)


def refuse_other_outputs(name: str, output: Any, expected: ExtraOutputs) -> None:
    """Refuse a block whose output has other parts than the first one's."""
    found = extra_outputs_of(output)
    if (found is None) != (expected is None) or _tensor_places(found) - _tensor_places(expected):
        raise InputError(f"{name} returns other values than the first block; not supported")


def _tensor_places(extra_outputs: ExtraOutputs) -> set[int]:
    return {place for place, tensor in enumerate(extra_outputs or ()) if tensor}


def unused_parameters(model: Any, names: Sequence[str], replaced: AbstractContextManager[Any]) -> frozenset[str]:
    """Parameters outside the blocks that no operation on a row takes; none where no row can be run.

    Args:
        model: Skeleton; all of it goes to the meta device.
        names: Names of its blocks.
        replaced: A context in which something stands in for the blocks; it gives their calls, or None.

    Raises:
        InputError: If a block is called more than once.
    """
    inside = tuple(f"{name}." for name in names)
    outside = {n: p for n, p in model.named_parameters() if not n.startswith(inside)}
    numbers = {id(parameter): name for name, parameter in outside.items()}
    # Zeros of any shape take the memory of one.
    zeros = {n: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), False) for n, p in outside.items()}
    places = [
        (m._parameters, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if id(p) in numbers
    ]
    uses = _ZeroUses({id(zero): name for name, zero in zeros.items()})
    calls, runs = None, True
    try:
        for owner, leaf, parameter in places:
            owner[leaf] = zeros[numbers[id(parameter)]]
        row = model_inputs(model, example_row(model))  # which asks the first parameter for its dtype
        with replaced as calls, torch.no_grad(), uses:
            model(**row)
    except TRACE_ERRORS:
        runs = False
    finally:
        for owner, leaf, parameter in places:
            owner[leaf] = parameter
        model.to("meta")
    if calls is not None and len(calls) > len(names):  # a data flow has its own check
        raise InputError(
            f"{type(model).__name__}: its blocks, from {names[0]} on, are called {len(calls)} times, expected "
            f"{len(names)}; models that run a block more than once are not supported"
        )
    return frozenset(name for name in outside if runs and not uses.counts[name])
