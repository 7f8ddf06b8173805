"""How a model is rounded to block types: stored scales first, then codes with compensation on the fixed grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockFields, block_grid, grid_values
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.errors import NumericalError
from hawqtool.model.block import LoadedBlock
from hawqtool.records import LinearSpec
from hawqtool.rounding.blocks.block_loop import round_block_codes
from hawqtool.rounding.blocks.block_search import search_blocks
from hawqtool.rounding.factor import Factor
from hawqtool.rounding.gptq import loop_errors, row_losses
from hawqtool.rounding.gram import quadratic_form
from hawqtool.rounding.input_drift import full_shift
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.spec import InitialRoundings, InputGroups, RoundingErrors, RoundingSpec
from hawqtool.rounding.statistics import GroupStatistics


@dataclass(frozen=True)
class BlockLayer:
    """A weight rounded to a block type.

    Args:
        name: Name of the linear.
        kind: Its type.
        fields: Codes and stored scales, rows in the checkpoint's order.
        values: ``[out, in]`` float32, the weights that they stand for.
        output_error: Squared error of its outputs over squared outputs, on the rounding rows.
        compensated: Whether later columns make up for errors.
    """

    name: str
    kind: BlockType
    fields: BlockFields
    values: Tensor
    output_error: float
    compensated: bool = False


@dataclass(frozen=True)
class BlockRounding(RoundingSpec):
    """`RoundingSpec` whose menu holds block types."""

    def tasks(self, block: LoadedBlock, group: Sequence[LinearSpec]) -> list[Task]:
        """The linears of an input group to be rounded, once for each of their types."""
        wanted = [linear for linear in group if self.formats_of(linear)]
        weights = {linear.name: block.weight(linear) for linear in wanted}
        return [
            Task(linear.name, weights[linear.name], kind, self.stored_dtypes[linear.name])
            for linear in wanted
            for kind in self.formats_of(linear)
        ]

    def on_block(self, block: LoadedBlock) -> BlockRounding:
        """Itself: scales of blocks depend on no other weight."""
        return self

    def layers(
        self, block: LoadedBlock, group: Sequence[LinearSpec], statistics: GroupStatistics
    ) -> list[tuple[BlockLayer, Tensor]]:
        """The linears of an input group in each of their types, with their weights.

        Raises:
            NumericalError: If a result is not finite; names the layer.
        """
        tasks = self.tasks(block, group)
        if not tasks:
            return []
        factor, part = self.factor(tasks, statistics), None
        if self.method.compensates and statistics.fitting is not None:
            part = self.factor(tasks, statistics.fitting)
        return [(round_layer(task, factor, statistics, self.method, part), task.weight) for task in tasks]

    def errors(self, block: LoadedBlock, group: Sequence[LinearSpec], statistics: GroupStatistics) -> RoundingErrors:
        """Rounding errors of one input group in all its types, ``[out, in]`` float32 by linear and label."""
        found: RoundingErrors = {}
        for layer, weight in self.layers(block, group, statistics):
            found.setdefault(layer.name, {})[layer.kind.label] = layer.values - weight
        return found

    def block_errors(
        self,
        block: LoadedBlock,
        groups: InputGroups,
        hidden: Sequence[Tensor],
        keep: Callable[[InitialRoundings], None] = lambda _: None,
    ) -> RoundingErrors:
        """Rounding errors of a block; nothing refines them.

        Args:
            block: The loaded block of the original model.
            groups: Its input groups.
            hidden: Hidden states before it.
            keep: Sees roundings to formats; block types have none.
        """
        found: RoundingErrors = {}
        for group, statistics in groups:
            found |= self.errors(block, group, statistics)
        return found


def round_layer(
    task: Task, factor: Factor, statistics: GroupStatistics, method: RoundingMethod, part: Factor | None = None
) -> BlockLayer:
    """Round one weight to the block type that its task names.

    Where some rows are held out, the weight is rounded on the others first, with compensation and to nearest; the way
    that has the less error on the held-out ones is taken.

    Args:
        task: Weight and block type.
        factor: Factor of the Gram matrix.
        statistics: Moments of the inputs.
        method: ``rtn`` or ``gptq``; with a share of the target shift.
        part: Factor of the Gram matrix of the rows that are not held out; None where nothing is to be chosen.

    Raises:
        NumericalError: If the result is not finite; names the layer.
    """
    kind, plain = cast(BlockType, task.quant_format), replace(method, name="rtn", shift=0.0)
    if part is not None and not _compensation_pays(task, part, statistics, method):
        method = plain
    fields = _rounded(task, factor, statistics, method)
    values = grid_values(fields.codes, block_grid(fields, kind), kind)
    power = quadratic_form(task.weight, statistics.gram, coarse=True).clamp_min(1e-30)
    error = quadratic_form(values - task.weight, statistics.gram, coarse=True) / power
    if not bool(torch.isfinite(error)):
        raise NumericalError(
            f"{task.name}: rounding gave values that are not finite; check this weight for NaN, Inf or beyond 1e5"
        )
    return BlockLayer(task.name, kind, fields, values, float(error), method.compensates)


def _rounded(task: Task, factor: Factor, statistics: GroupStatistics, method: RoundingMethod) -> BlockFields:
    """Codes and stored scales of one weight.

    Scales are searched against the damped diagonal of the Gram matrix, or, where tokens count by importance and later
    columns compensate, against what these leave of an error (see `Factor.conditional`), as on other grids.
    """
    kind, target = cast(BlockType, task.quant_format), task.weight
    if method.shift and statistics.drift is not None:
        target = target + cast(float, method.shift) * full_shift(target, statistics.drift, factor)
    if not method.compensates:
        return search_blocks(target, factor.diagonal, kind)
    if not statistics.weighted:
        return round_blocks(target, factor.diagonal, factor, kind)
    return round_blocks(target, factor.conditional, factor, kind, method.passes)


def round_blocks(target: Tensor, costs: Tensor, factor: Factor, kind: BlockType, passes: int = 1) -> BlockFields:
    """Scales, then codes by the column loop; again with scales for what the loop rounded, keeping each row's best.

    Args:
        target: ``[out, in]`` float32, what is rounded.
        costs: ``[in]`` float32, what a squared error costs in each column.
        factor: Factor of the Gram matrix of the inputs.
        kind: Type of the blocks.
        passes: How often scales are searched (two-pass scale search, see `RoundingMethod.passes`).
    """
    fields = search_blocks(target, costs, kind)
    best = latest = _with_loop(target, fields, factor, kind)
    least: Tensor | None = None
    for _ in range(passes - 1):
        values = grid_values(latest.codes, block_grid(latest, kind), kind)
        column_errors = loop_errors(target, values, factor)
        least = column_errors.square().sum(1) if least is None else least
        met = values + (column_errors * factor.upper.diagonal()).index_select(1, factor.order.argsort())
        latest = _with_loop(target, search_blocks(met, costs, kind), factor, kind)
        losses = row_losses(target, grid_values(latest.codes, block_grid(latest, kind), kind), factor)
        best = _merged(losses < least, latest, best)
        least = torch.minimum(losses, least)
    return best


def _with_loop(target: Tensor, fields: BlockFields, factor: Factor, kind: BlockType) -> BlockFields:
    return fields._replace(codes=round_block_codes(target, block_grid(fields, kind), factor, kind))


def _merged(rows: Tensor, new: BlockFields, old: BlockFields) -> BlockFields:
    """The rows that are marked from one result, the others from another."""
    wide = rows[:, None]
    parts = (
        None if first is None or second is None else torch.where(wide, first, second)
        for first, second in zip(new, old, strict=True)
    )
    return BlockFields(*parts)  # type: ignore[arg-type]


def _compensation_pays(task: Task, part: Factor, statistics: GroupStatistics, method: RoundingMethod) -> bool:
    """Whether later columns make up for errors on the held-out rows too, after rounding by the others."""
    fitting, held_out, kind = statistics.fitting, statistics.held_out, cast(BlockType, task.quant_format)
    assert fitting is not None and held_out is not None  # there is a factor of the former

    def loss(fields: BlockFields) -> Tensor:
        error = grid_values(fields.codes, block_grid(fields, kind), kind) - task.weight
        found = quadratic_form(error, held_out.gram)
        if held_out.drift is not None:
            found = found - 2 * (error * (task.weight @ held_out.drift)).sum()
        return found

    once = replace(method, passes=1)
    nearest = _rounded(task, part, fitting, replace(once, name="rtn", shift=0.0))
    return bool(loss(_rounded(task, part, fitting, once)) <= loss(nearest))


def round_alone(name: str, weight: Tensor, kind: BlockType) -> BlockFields:
    """Codes and stored scales of a matrix of whose inputs nothing is known, such as an embedding.

    Raises:
        NumericalError: If the result is not finite.
    """
    fields = search_blocks(weight, weight.new_ones(weight.shape[1]), kind)
    if not bool(torch.isfinite(grid_values(fields.codes, block_grid(fields, kind), kind)).all()):
        raise NumericalError(f"{name}: rounding gave values that are not finite; check this weight for NaN or Inf")
    return fields
