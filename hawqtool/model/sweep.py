"""Walk a model block by block, with one block's weights in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hawqtool.errors import InputError
from hawqtool.model.experts import ExpertLinear, counting_experts
from hawqtool.model.gram import gram
from hawqtool.model.layers import Structure
from hawqtool.model.prefetch import Prefetcher
from hawqtool.model.reader import check_finite
from hawqtool.model.replay import Call, replayed_blocks
from hawqtool.model.skeleton import find_blocks, to_meta
from hawqtool.model.spill import Shelf, Slices
from hawqtool.model.tasks import model_task
from hawqtool.model.timing import UNRECORDED, Recorder
from hawqtool.records import BlockSpec, LinearSpec


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or a packed folder read back."""

    def tensor(self, name: str) -> Tensor:
        """Tensor of that name, on the CPU."""

    def __contains__(self, name: object) -> bool: ...


@dataclass
class Activations:
    """Hidden states between blocks.

    Args:
        hidden: One ``[rows, positions, width]`` tensor per slice, replaced as the walk goes on.
        calls: Per slice and block, the other arguments of the block's call (masks, rotary tables).
        recorder: Takes note of forward passes and Gram matrices.
    """

    hidden: MutableSequence[Tensor]
    calls: list[list[Call]]
    recorder: Recorder = UNRECORDED


class ModelStream:
    """A model whose blocks are loaded when they are walked and dropped afterwards.

    Args:
        model: Skeleton, every parameter on meta.
        structure: Its discovered structure.
        source: Where the weights come from.
        device: Where to compute.
        dtype: dtype of weights and activations while computing.
        recorder: Takes note of the stages of walks.
        shelf: Keeps the hidden states between blocks; None keeps all of them on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        recorder: Recorder = UNRECORDED,
        shelf: Shelf | None = None,
    ) -> None:
        self.model: Any = model
        self.structure, self.source, self.recorder = structure, source, recorder
        self.task = model_task(model)
        self.device, self.dtype = device, dtype
        self._shelf = shelf
        self._last_index: int | None = None
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

    def _places(
        self, module: nn.Module, prefix: str, skip: str | None = None
    ) -> Iterator[tuple[str, list[tuple[str, nn.Module, str]]]]:
        """Stored name of each parameter with the places that share it."""
        aliases: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, owner in module.named_modules():
            for leaf, parameter in owner._parameters.items():
                name = f"{path}.{leaf}" if path else leaf
                if parameter is not None and not (skip and name.startswith(skip)):
                    tensor = self.structure.stored_names.get(prefix + name, prefix + name)
                    aliases.setdefault(id(parameter), []).append((tensor, owner, leaf))
        for places in aliases.values():
            stored = next((name for name, _, _ in places if name in self.source), None)
            if stored is None:
                raise InputError(
                    f"{places[0][0]} is not in the checkpoint; the model that config.json describes needs it"
                )
            yield stored, places

    def _load(self, module: nn.Module, prefix: str, skip: str | None = None) -> None:
        for stored, places in list(self._places(module, prefix, skip)):
            # First to the device, then to the dtype: fewer bytes travel.
            value = self.source.tensor(stored).to(self.device, non_blocking=True).to(self.dtype)
            check_finite(stored, value)
            parameter = nn.Parameter(value, requires_grad=False)
            for _, owner, leaf in places:
                owner._parameters[leaf] = parameter

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights loaded; they are dropped when the context ends."""
        module = self.blocks[index]
        with self.recorder.stage("load"):
            self._load(module, f"{self.blocks_name}.{index}.")
        self._expect_after(index)
        try:
            yield module
        finally:
            to_meta(module)

    def _expect_after(self, index: int) -> None:
        """Have the next block's weights read ahead where the source can: the walk goes on the way it came."""
        step = -1 if self._last_index == index + 1 else 1
        self._last_index = index
        if isinstance(self.source, Prefetcher):
            following = index + step
            inside = 0 <= following < len(self.blocks)
            places = self._places(self.blocks[following], f"{self.blocks_name}.{following}.") if inside else ()
            self.source.expect([stored for stored, _ in places])

    def embed(self, rows: Tensor, rows_per_slice: int) -> Activations:
        """Run what comes before the first block on ``rows``: ``[rows, seq_len]`` tokens, or images."""
        hidden: MutableSequence[Tensor] = [] if self._shelf is None else Slices(self._shelf)
        calls = []
        for part in rows.split(rows_per_slice):
            with replayed_blocks(self.blocks, self.structure.extra_outputs) as recorded, torch.no_grad():
                self.model.base_model(**self._inputs(part))
            hidden.append(recorded[0][0][0])
            calls.append([(args[1:], kwargs) for args, kwargs in recorded])
        return Activations(hidden, calls, self.recorder)

    def outputs(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """What the model is judged by, from the last block's output through the model's own head.

        Returns:
            Logits ``[rows, positions, classes]``, with one position where a row has one output, or embeddings
            ``[rows, 1, width]``: the mean of the last hidden state over positions.
        """
        with replayed_blocks(self.blocks, self.structure.extra_outputs, output=hidden):
            result = self.model(**self._inputs(rows))
        if not self.task.logits:
            return result.last_hidden_state.mean(1, keepdim=True)
        return result.logits[:, None] if self.task.per_row else result.logits

    def head_inputs(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Inputs ``[tokens, width]`` of the output head, from the last block's output."""
        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].flatten(0, -2)))
        try:
            self.outputs(rows, hidden)
        finally:
            hook.remove()
        return seen[0]

    def head_statistics(self, rows: Tensor, hidden: Sequence[Tensor]) -> GroupStatistics:
        """Second moments of the head's inputs over all slices; rows go one by one, because logits are large."""
        states = [state for part in hidden for state in part]
        with torch.no_grad():
            first, *others = (self.head_inputs(r[None], s[None]) for r, s in zip(rows, states, strict=True))
        total = _seen(first, len(first))
        for x in others:
            total += _seen(x, len(x))
        return total

    def _inputs(self, rows: Tensor) -> dict[str, Tensor]:
        moved = rows.to(self.device, self.dtype) if rows.is_floating_point() else rows.to(self.device)
        return {self.model.main_input_name: moved}

    def final_hidden(self, rows: Tensor, rows_per_slice: int, progress: Callable[[int], None]) -> Tensor:
        """Output of the last block for all rows, ``[rows, positions, width]``."""
        activations = self.embed(rows, rows_per_slice)
        for spec in self.structure.blocks:
            with self.block(spec.index) as block:
                advance(block, spec, activations)
            progress(spec.index)
        return torch.cat(list(activations.hidden))


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Output hidden state of one block call."""
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def advance(block: nn.Module, spec: BlockSpec, activations: Activations) -> None:
    """Replace the hidden states by the block's output, slice by slice."""
    with torch.no_grad(), activations.recorder.stage("forward"):
        for position, hidden in enumerate(activations.hidden):
            activations.hidden[position] = run_block(block, hidden, activations.calls[position][spec.index])


class _StageReached(Exception):
    """Stops a block's forward pass once the inputs of a stage have been seen."""


@dataclass
class GroupStatistics:
    """Second moments of an input group.

    Args:
        gram: ``[in, in]`` float32, mean of x xᵀ over the tokens.
        num_tokens: Tokens behind it.
        num_routed: Those of them that the model really sends here; fewer only in experts (see `counting_experts`).
    """

    gram: Tensor
    num_tokens: int
    num_routed: int

    def __iadd__(self, other: GroupStatistics) -> GroupStatistics:
        total = self.num_tokens + other.num_tokens
        self.gram.mul_(self.num_tokens / total).add_(other.gram, alpha=other.num_tokens / total)
        self.num_tokens, self.num_routed = total, self.num_routed + other.num_routed
        return self


GroupVisitor = Callable[[Sequence[LinearSpec], GroupStatistics], None]


def visit_groups(block: nn.Module, spec: BlockSpec, activations: Activations, visit: GroupVisitor) -> None:
    """Show every input group's statistics in call order, each after the groups before it may have changed.

    ``visit`` may replace the weights of the group; later groups, and the block's output that replaces the
    hidden states, see the new weights (truly sequential rounding). One slice needs one forward pass; several
    slices need one partial pass per stage and a full one.
    """
    recorder = activations.recorder
    if len(activations.hidden) == 1:
        with (
            counting_experts(block, 1),
            group_inputs(block, spec, lambda g, x, routed: visit(g, _seen(x, routed, recorder))),
        ):
            advance(block, spec, activations)
        return
    for stage in stages(spec):
        for group, statistics in group_statistics(block, spec, activations, stage):
            visit(group, statistics)
    advance(block, spec, activations)


def stages(spec: BlockSpec) -> list[list[Sequence[LinearSpec]]]:
    """Input groups in call order; those that do not depend on each other, the same role in all experts, together."""
    by_role: dict[str, list[Sequence[LinearSpec]]] = {}
    for group in spec.input_groups:
        role = re.sub(r"\.experts\.\d+\.", ".experts.*.", group[0].module_name)
        by_role.setdefault(role, []).append(group)
    return list(by_role.values())


def group_statistics(
    block: nn.Module, spec: BlockSpec, activations: Activations, groups: Sequence[Sequence[LinearSpec]]
) -> Iterator[tuple[Sequence[LinearSpec], GroupStatistics]]:
    """Statistics of some groups over all slices; a pass stops once it has seen the last of them."""
    totals: dict[str, GroupStatistics] = {}

    def accumulate(group: Sequence[LinearSpec], x: Tensor, routed: int) -> None:
        if group not in groups:
            return
        name = group[0].name
        seen = _seen(x, routed, activations.recorder)
        if name in totals:
            totals[name] += seen
        else:
            totals[name] = seen
        if group is groups[-1]:
            raise _StageReached

    for position, hidden in enumerate(activations.hidden):
        with (
            counting_experts(block, len(activations.hidden)),
            group_inputs(block, spec, accumulate),
            torch.no_grad(),
            activations.recorder.stage("forward"),
            suppress(_StageReached),
        ):
            run_block(block, hidden, activations.calls[position][spec.index])
    for group in groups:
        yield group, totals.pop(group[0].name)


def _seen(x: Tensor, routed: int, recorder: Recorder = UNRECORDED) -> GroupStatistics:
    with recorder.stage("gram"):
        return GroupStatistics(gram(x), x.shape[0], routed)


@contextmanager
def group_inputs(
    block: nn.Module, spec: BlockSpec, see: Callable[[Sequence[LinearSpec], Tensor, int], None]
) -> Iterator[None]:
    """While the context lasts, call ``see(group, inputs [tokens, in], routed)`` before each group's first linear.

    ``routed`` is the number of leading tokens that belong there; the rest only add to an expert's statistics.
    """

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], group: Sequence[LinearSpec]) -> None:
        x = inputs[0].flatten(0, -2)
        see(group, x, len(module.positions) if isinstance(module, ExpertLinear) else len(x))

    hooks = []
    for group in spec.input_groups:
        module = block.get_submodule(local_name(spec, group[0]))
        hooks.append(module.register_forward_pre_hook(partial(hook, group=group)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def local_name(block: BlockSpec, linear: LinearSpec) -> str:
    """Name of a linear inside its block."""
    return linear.module_name.removeprefix(f"{block.name}.")


def read_weight(block: nn.Module, spec: BlockSpec, linear: LinearSpec) -> Tensor:
    """Weight of a linear, ``[out, in]`` float32."""
    weight = block.get_parameter(f"{local_name(spec, linear)}.weight").float()
    return weight.t().contiguous() if linear.transposed else weight


def replace_weight(block: nn.Module, spec: BlockSpec, linear: LinearSpec, weight: Tensor) -> None:
    """Put a weight ``[out, in]`` in the place of the loaded one."""
    with torch.no_grad():
        block.get_parameter(f"{local_name(spec, linear)}.weight").copy_(weight.t() if linear.transposed else weight)
