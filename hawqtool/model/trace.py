"""Trace the calls of a model's blocks by what the model runs around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hawqtool.errors import InputError, one_line
from hawqtool.model.block_list import TRACE_ERRORS, example_row, run_on_zeros
from hawqtool.model.replay import Call, ExtraOutputs, replayed_blocks

_TRANSPOSES = (Tensor.T, Tensor.mT, Tensor.H)


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


def on_meta(call: Call) -> Call:
    """The call with its tensors on the meta device."""
    moved: Call = tree_map_only(Tensor, lambda t: t.to("meta"), call)
    return moved


def block_calls(model: Any, blocks: nn.ModuleList) -> tuple[list[Call], ExtraOutputs]:
    """Arguments of every block's call, and what blocks return beside the hidden state, which nothing may read."""
    kind = type(model).__name__
    calls, error, _ = _record_calls(model, blocks, None)
    if not calls:
        raise InputError(
            f"{kind}: the part before the blocks cannot be traced: {str(error).splitlines()[0]}"
        ) from error
    args, kwargs = on_meta(calls[0])
    try:
        with torch.no_grad():
            output = blocks[0].to("meta")(*args, **kwargs)
    except TRACE_ERRORS as raised:
        raise InputError(
            f"{kind}: block 0 cannot be run as config.json describes it ({one_line(raised)}); "
            "check its sizes, such as num_key_value_heads"
        ) from raised
    extra = extra_outputs_of(output)
    calls, error, _ = _record_calls(model, blocks, extra)
    if error is not None or len(calls) != len(blocks):
        reason = f": {str(error).splitlines()[0]}" if error else ""
        raise InputError(
            f"{kind}: {len(calls)} of {len(blocks)} blocks can be traced{reason}; not supported"
        ) from error
    if any(after[0][0] is not before[0][0] for before, after in pairwise(calls)):
        raise InputError(f"{kind}: hidden states are changed between blocks; not supported")
    if any(extra or ()):
        _refuse_readers(model, blocks, extra)
    return calls, extra


def _refuse_readers(model: Any, blocks: nn.ModuleList, extra_outputs: ExtraOutputs) -> None:
    """Refuse a model in which something reads more of a block than the hidden state: NaN stands for the rest."""
    calls, _, result = _record_calls(model, blocks, extra_outputs, ends=False)
    for place, seen in enumerate([*calls, result]):
        if any(_has_nan(leaf) for leaf in tree_leaves(dict(seen) if isinstance(seen, Mapping) else seen)):
            reader = f"block {place}" if place < len(blocks) else "what follows the blocks"
            raise InputError(
                f"{type(model).__name__}: {reader} reads more of an earlier block than a hidden state; not supported"
            )


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


def unused_parameters(
    model: Any, blocks: nn.ModuleList, blocks_name: str, extra_outputs: ExtraOutputs
) -> frozenset[str]:
    """Parameters outside the blocks that no operation on a row takes; none where that cannot be told without data."""
    outside = {n: p for n, p in model.named_parameters() if not n.startswith(f"{blocks_name}.")}
    uses = WeightUses({id(parameter): name for name, parameter in outside.items()})
    model.to("meta")
    with replayed_blocks(blocks, extra_outputs), torch.no_grad(), uses:
        try:
            model(**{model.main_input_name: example_row(model).to("meta")})
        except TRACE_ERRORS:
            return frozenset()
    return frozenset(name for name in outside if not uses.counts[name])
