"""How a model is rounded to block types: stored scales first, then codes with compensation on the fixed grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from hawqtool.rounding.gram import quadratic_form
from hawqtool.rounding.input_drift import full_shift
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.spec import InputGroups, RoundingErrors, RoundingSpec
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
    """

    name: str
    kind: BlockType
    fields: BlockFields
    values: Tensor
    output_error: float


@dataclass(frozen=True)
class BlockRounding(RoundingSpec):
    """`RoundingSpec` whose menu holds block types."""

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
        factor = self.factor(tasks, statistics)
        return [(round_layer(task, factor, statistics, self.method), task.weight) for task in tasks]

    def errors(self, block: LoadedBlock, group: Sequence[LinearSpec], statistics: GroupStatistics) -> RoundingErrors:
        """Rounding errors of one input group in all its types, ``[out, in]`` float32 by linear and label."""
        found: RoundingErrors = {}
        for layer, weight in self.layers(block, group, statistics):
            found.setdefault(layer.name, {})[layer.kind.label] = layer.values - weight
        return found

    def block_errors(self, block: LoadedBlock, groups: InputGroups, hidden: Sequence[Tensor]) -> RoundingErrors:
        """Rounding errors of a block; nothing refines them.

        Args:
            block: The loaded block of the original model.
            groups: Its input groups.
            hidden: Hidden states before it.
        """
        found: RoundingErrors = {}
        for group, statistics in groups:
            found |= self.errors(block, group, statistics)
        return found


def round_layer(task: Task, factor: Factor, statistics: GroupStatistics, method: RoundingMethod) -> BlockLayer:
    """Round one weight to the block type that its task names.

    Scales are searched against the damped diagonal of the Gram matrix, or, where tokens count by importance and later
    columns compensate, against what these leave of an error (see `Factor.conditional`), as on other grids.

    Args:
        task: Weight and block type.
        factor: Factor of the Gram matrix.
        statistics: Moments of the inputs.
        method: ``rtn`` or ``gptq``; with a share of the target shift.

    Raises:
        NumericalError: If the result is not finite; names the layer.
    """
    kind, target = cast(BlockType, task.quant_format), task.weight
    if method.shift and statistics.drift is not None:
        target = target + cast(float, method.shift) * full_shift(target, statistics.drift, factor)
    costs = factor.conditional if statistics.weighted and method.compensates else factor.diagonal
    fields = search_blocks(target, costs, kind)
    grid = block_grid(fields, kind)
    if method.compensates:
        fields = fields._replace(codes=round_block_codes(target, grid, factor, kind))
    values = grid_values(fields.codes, grid, kind)
    power = quadratic_form(task.weight, statistics.gram, coarse=True).clamp_min(1e-30)
    error = quadratic_form(values - task.weight, statistics.gram, coarse=True) / power
    if not bool(torch.isfinite(error)):
        raise NumericalError(
            f"{task.name}: rounding gave values that are not finite; check this weight for NaN, Inf or beyond 1e5"
        )
    return BlockLayer(task.name, kind, fields, values, float(error))


def round_alone(name: str, weight: Tensor, kind: BlockType) -> BlockFields:
    """Codes and stored scales of a matrix of whose inputs nothing is known, such as an embedding.

    Raises:
        NumericalError: If the result is not finite.
    """
    fields = search_blocks(weight, weight.new_ones(weight.shape[1]), kind)
    if not bool(torch.isfinite(grid_values(fields.codes, block_grid(fields, kind), kind)).all()):
        raise NumericalError(f"{name}: rounding gave values that are not finite; check this weight for NaN or Inf")
    return fields
