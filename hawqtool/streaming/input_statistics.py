"""Statistics of what the linears of a block see, group by group, while their weights may change on the way."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hawqtool.errors import InputError
from hawqtool.model.experts import ExpertLinear, counting_experts
from hawqtool.model.replay import Call
from hawqtool.records import BlockSpec, LinearSpec, TokenImportance
from hawqtool.rounding.statistics import GroupStatistics, is_held_out, second_moments
from hawqtool.streaming.block import Activations, advance, check_extremes, extremes, local_name, run_block


class _StageReached(Exception):
    """Stops a block's forward pass once the inputs of a stage have been seen."""


GroupVisitor = Callable[[Sequence[LinearSpec], GroupStatistics], None]


def collect_statistics(block: nn.Module, spec: BlockSpec, activations: Activations, visit: GroupVisitor) -> None:
    """Show every input group's statistics in call order, each after the groups before it may have changed.

    Linears of one input whose tokens have weights of their own are shown one by one.

    ``visit`` may replace the weights of the group; later groups, and the block's output that replaces the
    hidden states, see the new weights (truly sequential rounding). One batch needs one forward pass; several
    batches need one partial pass per stage and a full one. Where the original's inputs are wanted too, one batch needs
    a pass of its own for all of them beforehand; with several batches they come from a copy of the block that keeps
    its weights, run beside it.
    """
    if len(activations.hidden) == 1:
        part, others = _Batch.of(activations, 0, activations.hidden[0]), _original_inputs(block, spec, activations)

        def see(group: Sequence[LinearSpec], x: Tensor, routed: int) -> None:
            original_x = others.pop(group[0].name, None)
            for alike in equally_important(group, activations.importance):
                with activations.recorder.stage("gram"):
                    found = part.statistics(block, spec, alike, x, routed, original_x)
                visit(alike, found)

        with group_inputs(block, spec, see):
            _advance_counted(block, spec, activations)
        return
    original = None if activations.original is None else copy.deepcopy(block)
    for stage in stages(spec):
        for group, statistics in group_statistics(block, spec, activations, stage, original):
            visit(group, statistics)
    advance(block, spec, activations)
    _advance_original(original, spec, activations)


def replay_rounded(block: nn.Module, spec: BlockSpec, activations: Activations, replace: Callable[[], None]) -> None:
    """Leave what `collect_statistics` does, to the bit, where ``replace`` puts all weights in place that it would."""
    _advance_original(block, spec, activations)
    replace()
    _advance_counted(block, spec, activations)


def _original_inputs(block: nn.Module, spec: BlockSpec, activations: Activations) -> dict[str, Tensor]:
    """The original's inputs ``[tokens, in]`` of one batch by their group's first linear, where they are wanted.

    The block still has the original's weights. The original's hidden states become its output.
    """
    found: dict[str, Tensor] = {}
    if activations.original is not None:
        with group_inputs(block, spec, lambda group, x, _: found.update({group[0].name: x})):
            _advance_original(block, spec, activations)
    return found


def _advance_original(block: nn.Module | None, spec: BlockSpec, activations: Activations) -> None:
    """Replace the original's hidden states, where there are any, by the output of the block with its own weights."""
    if block is not None and activations.original is not None:
        advance(block, spec, Activations(activations.original, activations.calls, recorder=activations.recorder))


def _advance_counted(block: nn.Module, spec: BlockSpec, activations: Activations) -> None:
    """Replace the hidden states by the block's output.

    Experts are shown further tokens in a single pass, as it gives statistics and output at once.
    """
    with counting_experts(block, 1) if len(activations.hidden) == 1 else nullcontext():
        advance(block, spec, activations)


@dataclass(frozen=True)
class _Batch:
    """What statistics need to know of the rows of a batch.

    Args:
        first: Number of its first row among all rows.
        shape: Its rows and the positions of a row.
        holds_out: Whether some rows are kept apart.
        weights: How much each token of all rows counts.
    """

    first: int
    shape: tuple[int, int]
    holds_out: bool
    weights: TokenImportance | None

    @classmethod
    def of(cls, activations: Activations, first: int, hidden: Tensor) -> _Batch:
        """The batch with these hidden states ``[rows, positions, width]``."""
        return cls(first, (hidden.shape[0], hidden.shape[1]), activations.held_out, activations.importance)

    def statistics(
        self,
        block: nn.Module,
        spec: BlockSpec,
        group: Sequence[LinearSpec],
        x: Tensor,
        routed: int,
        original: Tensor | None = None,
    ) -> GroupStatistics:
        """Statistics of the inputs ``[tokens, in]`` of a group; the others are arguments of `seen`."""
        linear = block.get_submodule(local_name(spec, group[0]))
        held_out = held_out_tokens(linear, x, self.first, *self.shape) if self.holds_out else None
        weights = None if self.weights is None else self.weights.get(group[0].name)
        if weights is not None:
            weights = batch_importance(weights[self.first : self.first + self.shape[0]], x)
        return second_moments(x, routed, held_out, original, weights)


def equally_important(group: Sequence[LinearSpec], weights: TokenImportance | None) -> list[Sequence[LinearSpec]]:
    """Parts of an input group that share a Gram matrix: the whole of it, or linears with weights of their own."""
    if weights is None or group[0].name not in weights:
        return [group]
    return [(linear,) for linear in group]


def stages(spec: BlockSpec) -> list[list[Sequence[LinearSpec]]]:
    """Input groups in call order; those that do not depend on each other, the same role in all experts, together."""
    by_role: dict[str, list[Sequence[LinearSpec]]] = {}
    for group in spec.input_groups:
        role = re.sub(r"\.experts\.\d+\.", ".experts.*.", group[0].module_name)
        by_role.setdefault(role, []).append(group)
    return list(by_role.values())


def group_statistics(
    block: nn.Module,
    spec: BlockSpec,
    activations: Activations,
    groups: Sequence[Sequence[LinearSpec]],
    original: nn.Module | None = None,
    whole: bool = False,
) -> Iterator[tuple[Sequence[LinearSpec], GroupStatistics]]:
    """Statistics of some groups over all batches, of linears one by one where each has weights of its own.

    Args:
        block: The loaded block.
        spec: Its structure.
        activations: Hidden states before the block.
        groups: Input groups, in call order.
        original: The block with the original weights where the drift from its inputs is wanted, which also needs the
            original's hidden states.
        whole: Replace the hidden states by the block's output on the way; otherwise a pass stops once it has seen
            the last of the groups.

    Raises:
        NumericalError: If a value of the output is NaN or Inf; names the block.
    """
    totals: dict[str, GroupStatistics] = {}

    def walk() -> None:
        found, first = [], 0
        # Each batch is asked for once: it may come from the disk.
        for position, hidden in enumerate(activations.hidden):
            part = _Batch.of(activations, first, hidden)
            output = _add_batch(totals, block, spec, activations, position, hidden, part, groups, original, whole)
            if output is not None:
                found.append(extremes(output))
                activations.hidden[position] = output
            first += len(hidden)
        if whole:
            check_extremes(found, f"the output of block {spec.name}")

    walk()  # a function of its own, so that no batch stays in memory while the groups are visited
    for group in groups:
        for alike in equally_important(group, activations.importance):
            yield alike, totals.pop(alike[0].name)


def _add_batch(
    totals: dict[str, GroupStatistics],
    block: nn.Module,
    spec: BlockSpec,
    activations: Activations,
    position: int,
    hidden: Tensor,
    part: _Batch,
    groups: Sequence[Sequence[LinearSpec]],
    original: nn.Module | None,
    whole: bool,
) -> Tensor | None:
    """Add one batch to the totals of some groups; gives the block's output where the pass is to be whole."""
    call, batches = activations.calls[position][spec.index], len(activations.hidden)
    others: dict[str, Tensor] = {}

    def keep(group: Sequence[LinearSpec], x: Tensor, _routed: int) -> None:
        others[group[0].name] = x

    def accumulate(group: Sequence[LinearSpec], x: Tensor, routed: int) -> None:
        original_x = others.pop(group[0].name, None)
        for alike in equally_important(group, activations.importance):
            name = alike[0].name
            with activations.recorder.stage("gram"):
                found = part.statistics(block, spec, alike, x, routed, original_x)
            if name in totals:
                totals[name] += found
            else:
                totals[name] = found

    with activations.recorder.stage("forward"):
        if original is not None and activations.original is not None:
            _run_to(groups, original, spec, activations.original[position], call, batches, keep)
        return _run_to(groups, block, spec, hidden, call, batches, accumulate, whole)


def _run_to(
    groups: Sequence[Sequence[LinearSpec]],
    block: nn.Module,
    spec: BlockSpec,
    hidden: Tensor,
    call: Call,
    batches: int,
    see: Callable[[Sequence[LinearSpec], Tensor, int], None],
    whole: bool = False,
) -> Tensor | None:
    """Show the inputs of some groups in one batch; the pass stops behind the last, or gives the output if whole."""

    def see_wanted(group: Sequence[LinearSpec], x: Tensor, routed: int) -> None:
        if group not in groups:
            return
        see(group, x, routed)
        if group is groups[-1] and not whole:
            raise _StageReached

    with (
        counting_experts(block, batches),
        group_inputs(block, spec, see_wanted),
        torch.no_grad(),
        suppress(_StageReached),
    ):
        return run_block(block, hidden, call)
    return None


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


def held_out_tokens(linear: nn.Module, x: Tensor, first_row: int, rows: int, positions: int) -> Tensor:
    """Which inputs ``[tokens, in]`` of a linear belong to held-out rows: ``[tokens]`` bool.

    Args:
        linear: The linear; experts know which tokens they were shown.
        x: Its inputs, in order of the rows.
        first_row: Number of the batch's first row among all rows.
        rows: Rows of the batch.
        positions: Positions of a row.

    Raises:
        InputError: If the inputs cannot be told apart by rows.
    """
    if isinstance(linear, ExpertLinear):
        row = linear.shown // positions
    elif len(x) % rows:
        raise InputError(
            f"{len(x)} inputs of a linear do not divide among {rows} rows, so that rows cannot be held out; drop the "
            "settings that are chosen on them (foem_beta auto, target_shift auto, scale_refit)"
        )
    else:
        row = torch.arange(len(x), device=x.device) // (len(x) // rows)
    return is_held_out(first_row + row)


def batch_importance(weights: Tensor, x: Tensor) -> Tensor:
    """Weights of the inputs of a linear, ``[tokens]`` float32.

    Args:
        weights: ``[rows, positions]`` float32 of the batch.
        x: The inputs ``[tokens, in]``, in order of the rows.

    Raises:
        InputError: If the inputs are not those whose gradients were taken.
    """
    flat = weights.to(x.device).flatten()
    if len(flat) != len(x):
        raise InputError(
            f"{len(x)} inputs of a linear, expected the {len(flat)} whose gradients were taken: this model gives its "
            "layers other tokens than before; use --token-importance none"
        )
    return flat
