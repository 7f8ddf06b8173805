"""Walk a model block by block, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hawqtool.errors import InputError
from hawqtool.model.layers import Structure
from hawqtool.model.reader import check_finite
from hawqtool.model.replay import replayed_blocks
from hawqtool.model.skeleton import find_blocks, to_meta
from hawqtool.records import BlockSpec, LinearSpec

_GRAM_TOKENS = 1 << 14


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or a packed folder read back."""

    def tensor(self, name: str) -> Tensor:
        """Tensor of that name, on the CPU."""

    def __contains__(self, name: object) -> bool: ...


@dataclass
class Activations:
    """Hidden states between blocks.

    Args:
        hidden: One ``[rows, seq_len, width]`` tensor per slice, replaced as the walk goes on.
        calls: Per slice and block, the other arguments of the block's call (masks, rotary tables).
    """

    hidden: list[Tensor]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]


class ModelStream:
    """A model whose blocks are loaded when they are walked and dropped afterwards.

    Args:
        model: Skeleton, every parameter on meta.
        structure: Its discovered structure.
        source: Where the weights come from.
        device: Where to compute.
        dtype: dtype of weights and activations while computing.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, source: WeightSource, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model: Any = model
        self.structure, self.source = structure, source
        self.device, self.dtype = device, dtype
        self.blocks_name, self.blocks = find_blocks(model)
        to_meta(model)
        self._load(model, "", skip=f"{self.blocks_name}.")
        for name, buffer in model.named_buffers():
            if buffer.device.type == "meta":
                raise InputError(
                    f"buffer {name} is stored nowhere and cannot be rebuilt; this architecture is not supported"
                )
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)

    def _load(self, module: nn.Module, prefix: str, skip: str | None = None) -> None:
        aliases: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, owner in module.named_modules():
            for leaf, parameter in owner._parameters.items():
                name = f"{path}.{leaf}" if path else leaf
                if parameter is not None and not (skip and name.startswith(skip)):
                    aliases.setdefault(id(parameter), []).append((prefix + name, owner, leaf))
        for places in aliases.values():
            stored = next((name for name, _, _ in places if name in self.source), None)
            if stored is None:
                raise InputError(
                    f"{places[0][0]} is not in the checkpoint; the model that config.json describes needs it"
                )
            value = self.source.tensor(stored).to(device=self.device, dtype=self.dtype)
            check_finite(stored, value)
            parameter = nn.Parameter(value, requires_grad=False)
            for _, owner, leaf in places:
                owner._parameters[leaf] = parameter

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights loaded; they are dropped when the context ends."""
        module = self.blocks[index]
        self._load(module, f"{self.blocks_name}.{index}.")
        try:
            yield module
        finally:
            to_meta(module)

    def embed(self, tokens: Tensor, rows_per_slice: int) -> Activations:
        """Run what comes before the first block on ``tokens [rows, seq_len]``."""
        hidden, calls = [], []
        for part in tokens.split(rows_per_slice):
            with replayed_blocks(self.blocks) as recorded, torch.no_grad():
                getattr(self.model, self.model.base_model_prefix)(input_ids=part.to(self.device), use_cache=False)
            hidden.append(recorded[0][0][0])
            calls.append([(args[1:], kwargs) for args, kwargs in recorded])
        return Activations(hidden, calls)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits ``[rows, seq_len, vocab]`` from the last block's output, through the model's own head."""
        with replayed_blocks(self.blocks, output=hidden):
            return self.model(input_ids=tokens.to(self.device), use_cache=False).logits

    def final_hidden(self, tokens: Tensor, rows_per_slice: int, progress: Callable[[int], None]) -> Tensor:
        """Output of the last block for all rows, ``[rows, seq_len, width]``."""
        activations = self.embed(tokens, rows_per_slice)
        for spec in self.structure.blocks:
            with self.block(spec.index) as block:
                advance(block, spec, activations)
            progress(spec.index)
        return torch.cat(activations.hidden)


def run_block(block: nn.Module, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Output hidden state of one block call."""
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def advance(block: nn.Module, spec: BlockSpec, activations: Activations) -> None:
    """Replace the hidden states by the block's output, slice by slice."""
    with torch.no_grad():
        for position, hidden in enumerate(activations.hidden):
            activations.hidden[position] = run_block(block, hidden, activations.calls[position][spec.index])


class _GroupReached(Exception):
    """Stops a block's forward pass once the inputs of a group have been seen."""


GroupVisitor = Callable[[Sequence[LinearSpec], Tensor, int], None]
"""Called with the group, its Gram matrix (mean of x xᵀ, float32) and the number of tokens."""


def visit_groups(block: nn.Module, spec: BlockSpec, activations: Activations, visit: GroupVisitor) -> None:
    """Show every input group's Gram matrix in call order, each after the groups before it may have changed.

    ``visit`` may replace the weights of the group; later groups, and the block's output that replaces the
    hidden states, see the new weights (truly sequential rounding). One slice needs one forward pass; several
    slices need one partial pass per group and a full one.
    """
    if len(activations.hidden) == 1:
        with group_inputs(block, spec, lambda group, x: visit(group, gram(x), x.shape[0])):
            advance(block, spec, activations)
        return
    for group in spec.input_groups:
        visit(group, *_stopped_gram(block, spec, group, activations))
    advance(block, spec, activations)


def _stopped_gram(
    block: nn.Module, spec: BlockSpec, group: Sequence[LinearSpec], activations: Activations
) -> tuple[Tensor, int]:
    total: Tensor | None = None
    tokens = 0

    def accumulate(reached: Sequence[LinearSpec], x: Tensor) -> None:
        nonlocal total, tokens
        if reached is group:
            part = gram(x) * x.shape[0]
            total = part if total is None else total.add_(part)
            tokens += x.shape[0]
            raise _GroupReached

    for position, hidden in enumerate(activations.hidden):
        with group_inputs(block, spec, accumulate), torch.no_grad():
            try:
                run_block(block, hidden, activations.calls[position][spec.index])
            except _GroupReached:
                continue
    assert total is not None  # discovery proved that the group is called
    return total / tokens, tokens


@contextmanager
def group_inputs(
    block: nn.Module, spec: BlockSpec, see: Callable[[Sequence[LinearSpec], Tensor], None]
) -> Iterator[None]:
    """While the context lasts, call ``see(group, inputs [tokens, in])`` before each group's first linear runs."""
    hooks = []
    for group in spec.input_groups:
        module = block.get_submodule(local_name(spec, group[0]))
        hooks.append(
            module.register_forward_pre_hook(lambda _m, inputs, group=group: see(group, inputs[0].flatten(0, -2)))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def local_name(block: BlockSpec, linear: LinearSpec) -> str:
    """Name of a linear inside its block."""
    return linear.name[len(block.name) + 1 :]


def gram(inputs: Tensor) -> Tensor:
    """Mean of x xᵀ over tokens, ``[in, in]`` float32, from ``[tokens, in]``.

    Half-precision inputs on a GPU are multiplied on tensor cores: their products are exact in float32, which
    is also the dtype of the sums and of the output.
    """
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32, device=inputs.device)
    for part in inputs.split(_GRAM_TOKENS):
        if part.is_cuda and part.dtype in (torch.bfloat16, torch.float16):
            total += torch.mm(part.t(), part, out_dtype=torch.float32)
        else:
            total.addmm_(part.t().float(), part.float())
    return total / inputs.shape[0]
