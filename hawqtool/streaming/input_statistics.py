"""Statistics of what the linears of a block see, group by group, while their weights may change on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hawqtool.errors import InputError
from hawqtool.model.block import LoadedBlock
from hawqtool.model.experts import ExpertLinear, counting_experts, has_experts
from hawqtool.records import BlockSpec, LinearSpec, TokenImportance
from hawqtool.rounding.spec import InputGroups
from hawqtool.rounding.statistics import GroupStatistics, is_held_out, second_moments
from hawqtool.streaming.block import Activations, advance, check_extremes, extremes
from hawqtool.streaming.rounded_inputs import exact_inputs


class _StageReached(Exception):
    """Stops a block's forward pass once the inputs of a stage have been seen."""


GroupVisitor = Callable[[InputGroups], None]
"""Takes input groups that do not depend on each other, with their statistics; each is made when it is asked for."""

InputVisitor = Callable[[Sequence[LinearSpec], Tensor, int], None]
"""Takes an input group, its inputs ``[tokens, in]``, and how many of the leading tokens belong there."""


def collect_statistics(block: LoadedBlock, activations: Activations, visit: GroupVisitor) -> None:
    """Show every input group's statistics in call order, each after the groups before it may have changed.

    Linears of one input whose tokens have importances of their own are shown one by one.

    ``visit`` may replace the weights of the groups; later ones, and the block's output that replaces the
    hidden states, see the new weights (truly sequential rounding). One batch needs one forward pass; several
    batches, and experts on a GPU or on several ranks, need one partial pass per stage and a full one. Where the
    original's inputs are wanted too, one batch needs a pass of its own for all of them beforehand; with several
    batches they come from a copy of the block that keeps its weights, run beside it.
    """
    if _one_pass(block, activations):
        part, others = _Batch.of(activations, 0, activations.hidden[0]), _original_inputs(block, activations)

        def see(group: Sequence[LinearSpec], x: Tensor, routed: int) -> None:
            original_x = others.pop(group[0].name, None)
            seen.add(group[0].name)
            visit(each(group, x, routed, original_x))

        def each(group: Sequence[LinearSpec], x: Tensor, routed: int, original_x: Tensor | None) -> InputGroups:
            for alike in equally_important(group, activations.importance):
                with activations.recorder.stage("gram"):
                    statistics = part.statistics(block, alike, x, routed, original_x)
                yield alike, statistics

        seen: set[str] = set()
        with group_inputs(block, see):
            _advance_counted(block, activations)
        _refuse_bypassed(block.spec.input_groups, seen)
        return
    original = None if activations.original is None else block.copy()
    for stage in stages(block.spec):
        visit(group_statistics(block, activations, stage, original))
    advance(block, activations)
    _advance_original(original, activations)


def replay_rounded(block: LoadedBlock, activations: Activations, replace: Callable[[], None]) -> None:
    """Leave what `collect_statistics` does, to the bit, where ``replace`` puts all weights in place that it would."""
    _advance_original(block, activations)
    replace()
    _advance_counted(block, activations)


def _one_pass(block: LoadedBlock, activations: Activations) -> bool:
    """Whether statistics are taken in one pass.

    Not those of experts whose tokens lie on several ranks, nor on a GPU, which rounds many of them together: in one
    pass each would have to be rounded before the next one is run.
    """
    if len(activations.hidden) > 1:
        return False
    apart = activations.ranks.size > 1 or next(block.module.parameters()).is_cuda
    return not (apart and has_experts(block.module))


def _original_inputs(block: LoadedBlock, activations: Activations) -> dict[str, Tensor]:
    """The original's inputs ``[tokens, in]`` of one batch by their group's first linear, where they are wanted.

    The block still has the original's weights. The original's hidden states become its output.
    """
    inputs: dict[str, Tensor] = {}
    if activations.original is not None:
        with group_inputs(block, lambda group, x, _: inputs.update({group[0].name: x})):
            _advance_original(block, activations)
    return inputs


def _advance_original(block: LoadedBlock | None, activations: Activations) -> None:
    """Replace the original's hidden states, where there are any, by the output of the block with its own weights."""
    if block is not None and activations.original is not None:
        with exact_inputs(block.module):
            advance(block, Activations(activations.original, activations.calls, recorder=activations.recorder))


def _advance_counted(block: LoadedBlock, activations: Activations) -> None:
    """Replace the hidden states by the block's output.

    Experts are shown further tokens in a single pass, as it gives statistics and output at once.
    """
    with counting_experts(block.module, 1) if _one_pass(block, activations) else nullcontext():
        advance(block, activations)


@dataclass(frozen=True)
class _Batch:
    """What statistics need to know of the rows of a batch.

    Args:
        first: Number of its first row among the rows of all ranks.
        shape: Its rows and the positions of a row.
        holds_out: Whether some rows are kept apart.
        importance: How much each token of all rows counts; None where all count alike.
        at_outputs: As in `Activations`.
    """

    first: int
    shape: tuple[int, int]
    holds_out: bool
    importance: TokenImportance | None
    at_outputs: bool

    @classmethod
    def of(cls, activations: Activations, first: int, hidden: Tensor) -> _Batch:
        """The batch with these hidden states ``[rows, positions, width]``."""
        first += activations.first_row
        shape = hidden.shape[0], hidden.shape[1]
        return cls(first, shape, activations.held_out, activations.importance, activations.at_outputs)

    def statistics(
        self,
        block: LoadedBlock,
        group: Sequence[LinearSpec],
        x: Tensor,
        routed: int,
        original: Tensor | None = None,
    ) -> GroupStatistics:
        """Statistics of the inputs ``[tokens, in]`` of a group; the others are those of `second_moments`."""
        linear = block.linear(group[0])
        held_out = held_out_tokens(linear, x, self.first, *self.shape) if self.holds_out else None
        importance = None if self.importance is None else self.importance.get(group[0].name)
        if importance is not None:
            importance = batch_importance(importance[self.first : self.first + self.shape[0]], x)
        weight: Tensor | None = None
        if self.at_outputs and _has_few_outputs(group):
            weight = block.parameter(group[0])
            weight = weight.t() if group[0].transposed else weight
        return second_moments(x, routed, held_out, original, importance, weight)


def _has_few_outputs(group: Sequence[LinearSpec]) -> bool:
    """Whether W (x0 - x) and its products with x take less work than those of x0 - x itself."""
    return len(group) == 1 and 2 * group[0].out_features < group[0].in_features


def equally_important(group: Sequence[LinearSpec], importance: TokenImportance | None) -> list[Sequence[LinearSpec]]:
    """Parts of an input group that share a Gram matrix: all of it, or single linears, each with its own importances."""
    if importance is None or group[0].name not in importance:
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
    block: LoadedBlock,
    activations: Activations,
    groups: Sequence[Sequence[LinearSpec]],
    original: LoadedBlock | None = None,
    whole: bool = False,
) -> Iterator[tuple[Sequence[LinearSpec], GroupStatistics]]:
    """Statistics of some groups over all batches, of linears one by one where each has importances of its own.

    Args:
        block: The loaded block.
        activations: Hidden states before the block.
        groups: Input groups, in call order.
        original: The block with the original weights where the drift from its inputs is wanted, which also needs the
            original's hidden states.
        whole: Replace the hidden states by the block's output on the way; otherwise a pass stops once it has seen
            the last of the groups.

    Raises:
        NumericalError: If a value of the output is NaN or Inf; names the block.
        InputError: If a linear was not called.
    """
    totals = _Totals(activations, groups, {})
    totals.add_batches(block, original, whole)
    _refuse_bypassed(groups, totals.statistics)
    for group in groups:
        for alike in equally_important(group, activations.importance):
            yield alike, totals.statistics.pop(alike[0].name)


def _refuse_bypassed(groups: Sequence[Sequence[LinearSpec]], seen: Container[str]) -> None:
    """Refuse a block that computed without calling some of its linears, though the trace without data called them."""
    missed = next((group[0].name for group in groups if group[0].name not in seen), None)
    if missed is not None:
        raise InputError(
            f"{missed} was not called with data, as it was in the trace: its module reads its weight directly, as "
            "fused kernels on a GPU do; expected a call, whose inputs rounding needs; use --device cpu, or remove "
            "the kernels"
        )


@dataclass(frozen=True)
class _Totals:
    """Statistics of some input groups, added up batch by batch.

    Args:
        activations: Hidden states before the block.
        groups: The groups, in call order.
        statistics: By name of the first of the linears that share them.
    """

    activations: Activations
    groups: Sequence[Sequence[LinearSpec]]
    statistics: dict[str, GroupStatistics]

    def add_batches(self, block: LoadedBlock, original: LoadedBlock | None, whole: bool) -> None:
        """Add all batches; no one of them stays in memory. The arguments are those of `group_statistics`."""
        limits, first = [], 0
        # Each batch is asked for once: it may come from the disk.
        for position, hidden in enumerate(self.activations.hidden):
            batch = _Batch.of(self.activations, first, hidden)
            others = {} if original is None else self._original_inputs(original, position)
            with self.activations.recorder.stage("forward"):
                output = self._run(block, position, hidden, partial(self._add, block, batch, others), whole)
            if output is not None:
                limits.append(extremes(output))
                self.activations.hidden[position] = output
            first += len(hidden)
        if whole:
            check_extremes(limits, f"the output of block {block.spec.name}")

    def _original_inputs(self, original: LoadedBlock, position: int) -> dict[str, Tensor]:
        """The original's inputs ``[tokens, in]`` of one batch by their group's first linear, where they are wanted."""
        inputs: dict[str, Tensor] = {}
        if self.activations.original is not None:
            hidden = self.activations.original[position]
            with self.activations.recorder.stage("forward"), exact_inputs(original.module):
                self._run(original, position, hidden, lambda group, x, _: inputs.update({group[0].name: x}))
        return inputs

    def _add(
        self,
        block: LoadedBlock,
        batch: _Batch,
        others: dict[str, Tensor],
        group: Sequence[LinearSpec],
        x: Tensor,
        routed: int,
    ) -> None:
        """Add the inputs of a group in one batch; ``others`` are the original's."""
        original_x = others.pop(group[0].name, None)
        for alike in equally_important(group, self.activations.importance):
            name = alike[0].name
            with self.activations.recorder.stage("gram"):
                statistics = batch.statistics(block, alike, x, routed, original_x)
            if name in self.statistics:
                self.statistics[name] += statistics
            else:
                self.statistics[name] = statistics

    def _run(
        self, block: LoadedBlock, position: int, hidden: Tensor, see: InputVisitor, whole: bool = False
    ) -> Tensor | None:
        """Show the inputs of the groups in one batch; stop behind the last of them, or give the output if whole."""

        def see_wanted(group: Sequence[LinearSpec], x: Tensor, routed: int) -> None:
            if group not in self.groups:
                return
            see(group, x, routed)
            if group is self.groups[-1] and not whole:
                raise _StageReached

        with (
            counting_experts(block.module, len(self.activations.hidden) * self.activations.ranks.size),
            group_inputs(block, see_wanted),
            torch.no_grad(),
            suppress(_StageReached),
        ):
            return block.run(hidden, self.activations.calls[position][block.spec.index])
        return None


@contextmanager
def group_inputs(block: LoadedBlock, see: InputVisitor) -> Iterator[None]:
    """While the context lasts, call ``see(group, inputs [tokens, in], routed)`` before each group's first linear.

    ``routed`` is the number of leading tokens that belong there; the rest only add to an expert's statistics.
    """

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], group: Sequence[LinearSpec]) -> None:
        x = inputs[0].flatten(0, -2)
        see(group, x, len(module.positions) if isinstance(module, ExpertLinear) else len(x))

    hooks = []
    for group in block.spec.input_groups:
        hooks.append(block.linear(group[0]).register_forward_pre_hook(partial(hook, group=group)))
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


def batch_importance(importance: Tensor, x: Tensor) -> Tensor:
    """Importance of the inputs of a linear, ``[tokens]`` float32.

    Args:
        importance: ``[rows, positions]`` float32 of the batch.
        x: The inputs ``[tokens, in]``, in order of the rows.

    Raises:
        InputError: If the inputs are not those whose gradients were taken.
    """
    flat = importance.to(x.device).flatten()
    if len(flat) != len(x):
        raise InputError(
            f"{len(x)} inputs of a linear, expected the {len(flat)} whose gradients were taken: this model gives its "
            "layers other tokens than before; use --token-importance none"
        )
    return flat
