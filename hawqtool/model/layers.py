"""Find the linears of a model, what shares an input, and what cannot be quantized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hawqtool.errors import InputError
from hawqtool.model.dtypes import DTYPE_BYTES
from hawqtool.model.index import CheckpointIndex
from hawqtool.model.replay import replayed_blocks
from hawqtool.model.skeleton import find_blocks
from hawqtool.model.units import unit_name
from hawqtool.records import BlockSpec, LinearSpec, Unit

_DISCOVERY_TOKENS = 8
_FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Structure:
    """What is known of a model from its config and headers alone.

    Args:
        blocks: Blocks in order.
        other_linears: Names of linears outside the blocks, which stay as they are.
    """

    blocks: tuple[BlockSpec, ...]
    other_linears: tuple[str, ...]

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """Every quantizable linear by name, in call order."""
        return {spec.name: spec for block in self.blocks for spec in block.linears}

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
        if getattr(func, "__name__", "") != "__get__":  # reading .dtype or .device is not a use
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self.watched:
                    self.counts[self.watched[id(leaf)]] += 1
        return func(*args, **kwargs)


def discover(model: nn.Module, index: CheckpointIndex) -> Structure:
    """Run one row of meta tensors through every block and keep what it proves.

    A linear is quantizable when it is called exactly once, its weight takes part in one operation only, is
    shared with nothing, and is stored under its own name. Every other parameter of a block must have one
    dimension. Input groups are found by the identity of the input tensor, held while comparing.

    Raises:
        InputError: Naming the first layer that fails, with the reason.
    """
    name, blocks = find_blocks(model)
    for position, block in enumerate(blocks):
        _refuse_other_matrices(f"{name}.{position}", block)
    calls = _block_calls(model, blocks)
    _refuse_shared_weights(model, name)
    specs = []
    for position, block in enumerate(blocks):
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), calls[position])
        specs.append(_discover_block(position, f"{name}.{position}", block, args, kwargs, index))
    inside = {spec.name for block in specs for spec in block.linears}
    others = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in inside)
    return Structure(tuple(specs), others)


def _block_calls(model: Any, blocks: nn.ModuleList) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    width = model.get_input_embeddings().weight.shape[1]
    row = torch.zeros(1, _DISCOVERY_TOKENS, width, dtype=model.dtype)
    base = getattr(model, model.base_model_prefix)
    with replayed_blocks(blocks) as calls, torch.no_grad():
        # With the blocks replaced, what is left with one dimension are final norms: any values will do.
        norms = {n: torch.ones_like(p, device="cpu") for n, p in base.named_parameters() if p.ndim == 1}
        try:
            torch.func.functional_call(base, norms, (), {"inputs_embeds": row, "use_cache": False})
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{type(model).__name__}: the part before the blocks cannot be traced: {reason}"
            ) from error
    if len(calls) != len(blocks):
        raise InputError(f"{type(model).__name__}: {len(calls)} of {len(blocks)} blocks were called; not supported")
    return calls


def _refuse_shared_weights(model: nn.Module, blocks_name: str) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and (name.startswith(blocks_name) or first.startswith(blocks_name)):
            raise InputError(f"{name} shares its weight with {first}; shared block weights are not supported")


def _refuse_other_matrices(name: str, block: nn.Module) -> None:
    weights = {f"{n}.weight" for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim >= 2 and parameter_name not in weights:
            raise InputError(
                f"{name}.{parameter_name} has shape {tuple(parameter.shape)} and is no linear layer's weight; "
                "blocks with such parameters are not supported yet"
            )


def _discover_block(
    position: int, name: str, block: nn.Module, args: Any, kwargs: Any, index: CheckpointIndex
) -> BlockSpec:
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, inputs, n=n: seen.append((n, inputs[0])))
        for n, module in linears.items()
    ]
    block.to("meta")
    uses = _WeightUses({id(m.weight): n for n, m in linears.items()})
    try:
        with torch.no_grad(), uses:
            block(*args, **kwargs)
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
        spec = _linear_spec(f"{name}.{linear}", linears[linear], position, index)
        for held, members in groups:
            if held is tensor:
                members.append(spec)
                break
        else:
            groups.append((tensor, [spec]))
    return BlockSpec(position, name, tuple(tuple(members) for _, members in groups))


def _linear_spec(name: str, module: nn.Linear, position: int, index: CheckpointIndex) -> LinearSpec:
    info = index.tensors.get(f"{name}.weight")
    if info is None:
        raise InputError(
            f"{name}.weight is not in the checkpoint; its tensor names differ from the model's, not supported"
        )
    if info.dtype not in _FLOAT_DTYPES:
        raise InputError(f"{name}.weight is stored as {info.dtype}; expected one of {', '.join(_FLOAT_DTYPES)}")
    if info.shape != tuple(module.weight.shape):
        raise InputError(
            f"{name}.weight has shape {info.shape} in the file, config.json implies {tuple(module.weight.shape)}"
        )
    return LinearSpec(name, info.shape[0], info.shape[1], position, unit_name(name), DTYPE_BYTES[info.dtype])


def check_shapes(model: nn.Module, index: CheckpointIndex) -> None:
    """Compare every parameter of the model with the checkpoint's header.

    Raises:
        InputError: Naming the first tensor whose shape is not the one that config.json implies.
    """
    for name, parameter in model.named_parameters():
        info = index.tensors.get(name)
        if info is not None and info.shape != tuple(parameter.shape):
            raise InputError(
                f"{name} has shape {info.shape} in the file, config.json implies {tuple(parameter.shape)}; "
                "expected a config.json and weights of one model; download them again"
            )
