"""How a model is rounded: method, formats and stored dtypes, applied to the input groups of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.formats import QuantFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.records import LinearSpec, Menu, OutputMoments, UnitFormats
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.floats.scale_search import common_divisor
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.lattice import on_grid
from hawqtool.rounding.layer import round_group
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics


@dataclass(frozen=True)
class InitialRounding:
    """A rounded layer that learning starts from.

    Args:
        name: Its name.
        weight: ``[out, in]``, the weight before rounding.
        rounded: Codes, scales and zero points.
        quant_format: Format.
    """

    name: str
    weight: Tensor
    rounded: Quantized
    quant_format: QuantFormat


InitialRoundings = dict[str, dict[str, InitialRounding]]
"""Rounded layers by linear and format label."""

RoundingErrors = dict[str, dict[str, Tensor]]
"""D = Q(W) - W by linear and format label, each ``[out, in]`` float32."""

TOGETHER_ELEMENTS = 1 << 29
"""Most weights, one in several formats counting as several, that go through the column loop together."""

InputGroups = Iterable[tuple[Sequence[LinearSpec], GroupStatistics]]
"""Linears that share an input, with the statistics of that input."""


class Refiner(Protocol):
    """Improves the roundings of a block, each format by itself, as refinement will."""

    def __call__(self, block: LoadedBlock, hidden: Sequence[Tensor], initial: InitialRoundings) -> InitialRoundings:
        """Roundings that take the place of ``initial``.

        Args:
            block: The loaded block of the original model; it stays as it is.
            hidden: The original's hidden states before the block on the rows that were rounded on, by batch.
            initial: What rounding gave.
        """


@dataclass(frozen=True)
class RoundingSpec:
    """How the linears of a model are rounded.

    Args:
        method: Rounding method.
        menu: Formats by unit; linears of other units are left as they are.
        stored_dtypes: dtype of the stored scales by linear.
        refiner: Improves the roundings of a whole block; None for roundings as they are. It has no say in those of an
            output head.
        output_moments: Of the linears that are rounded with output feedback when a plan is carried out; roundings that
            are scored or tried go without.
        divisors: Of E4M3 scales, by unit; of units that are not named, from the weights of the block.
        input_divisors: Of E4M3 scales of inputs, by linear, to be stored with it.
    """

    method: RoundingMethod
    menu: Menu
    stored_dtypes: Mapping[str, torch.dtype]
    refiner: Refiner | None = None
    output_moments: Mapping[str, OutputMoments] = field(default_factory=dict)
    divisors: Mapping[str, float] = field(default_factory=dict)
    input_divisors: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_plan(
        cls, method: RoundingMethod, formats: UnitFormats, stored_dtypes: Mapping[str, torch.dtype]
    ) -> RoundingSpec:
        """One format for every unit, as a plan has it."""
        return cls.of_menu(method, {unit: (fmt,) for unit, fmt in formats.items()}, stored_dtypes)

    @classmethod
    def of_menu(
        cls,
        method: RoundingMethod,
        menu: Menu,
        stored_dtypes: Mapping[str, torch.dtype],
        refiner: Refiner | None = None,
    ) -> RoundingSpec:
        """Every format of a menu in which something is rounded."""
        rounded = {unit: tuple(f for f in formats if not f.is_unquantized) for unit, formats in menu.items()}
        return cls(method, rounded, stored_dtypes, refiner)

    def formats_of(self, linear: LinearSpec) -> Sequence[QuantFormat]:
        """Formats of a linear; none where it is left as it is."""
        return self.menu.get(linear.unit, ())

    def tasks(self, block: LoadedBlock, group: Sequence[LinearSpec]) -> list[Task]:
        """The linears of an input group to be rounded, once for each of their formats."""
        wanted = [linear for linear in group if self.formats_of(linear)]
        weights = {linear.name: block.weight(linear) for linear in wanted}
        divided = {linear.unit for linear in wanted if any(map(_has_divisor, self.formats_of(linear)))}
        divisors = {unit: self.divisors.get(unit) or unit_divisor(block, unit) for unit in divided}
        tasks = [self._task(linear, weights[linear.name], fmt) for linear in wanted for fmt in self.formats_of(linear)]
        units = [linear.unit for linear in wanted for _ in self.formats_of(linear)]
        pairs = zip(tasks, units, strict=True)
        return [replace(t, divisor=divisors[unit]) if _has_divisor(t.quant_format) else t for t, unit in pairs]

    def on_block(self, block: LoadedBlock) -> RoundingSpec:
        """The same with what depends on all original weights of a fused set, which are about to be replaced."""
        wanted = (linear.unit for linear in block.spec.linears if any(map(_has_divisor, self.formats_of(linear))))
        return replace(self, divisors={unit: unit_divisor(block, unit) for unit in dict.fromkeys(wanted)})

    def _task(self, linear: LinearSpec, weight: Tensor, fmt: QuantFormat) -> Task:
        """One of them; experts of quantized originals that lie on the grid of the format stay what they are."""
        dtype = self.stored_dtypes[linear.name]
        given = on_grid(weight, fmt, dtype) if is_expert(linear.name) else None
        return Task(linear.name, weight, fmt, dtype, given)

    def factor(self, tasks: Sequence[Task], statistics: GroupStatistics) -> Factor:
        """Factor of the Gram matrix behind some tasks.

        Raises:
            NumericalError: If there is none; names the first of the layers.
        """
        return factorize(statistics.gram, statistics.num_tokens, self.method.damping, name=tasks[0].name)

    def roundings(
        self, block: LoadedBlock, group: Sequence[LinearSpec], statistics: GroupStatistics
    ) -> InitialRoundings:
        """Roundings of one input group in all its formats, not refined."""
        found: InitialRoundings = {}
        tasks = self.tasks(block, group)
        if not tasks:
            return found
        factor = self.factor(tasks, statistics)
        for part in _parts(tasks):
            for task, rounded in zip(part, round_group(part, factor, self.method, statistics), strict=True):
                rounding = InitialRounding(task.name, task.weight, rounded, task.quant_format)
                found.setdefault(task.name, {})[task.quant_format.label] = rounding
        return found

    def errors(self, block: LoadedBlock, group: Sequence[LinearSpec], statistics: GroupStatistics) -> RoundingErrors:
        """Rounding errors of one input group in all its formats, not refined."""
        return _as_errors(self.roundings(block, group, statistics))

    def block_errors(
        self,
        block: LoadedBlock,
        groups: InputGroups,
        hidden: Sequence[Tensor],
        keep: Callable[[InitialRoundings], None] = lambda _: None,
    ) -> RoundingErrors:
        """Rounding errors of a block, refined where that is asked for.

        Args:
            block: The loaded block of the original model.
            groups: Its input groups, those of which no linear is rounded may be missing.
            hidden: Hidden states before it, for the refiner.
            keep: Sees the roundings before they are refined.
        """
        found: InitialRoundings = {}
        for group, statistics in groups:
            found |= self.roundings(block, group, statistics)
        keep(found)
        return _as_errors(found if self.refiner is None else self.refiner(block, hidden, found))


def unit_divisor(block: LoadedBlock, unit: str) -> float:
    """Divisor of the E4M3 scales of a unit, from its weights in a block (see `common_divisor`)."""
    return common_divisor([block.weight(linear) for linear in block.spec.linears if linear.unit == unit])


def _has_divisor(fmt: QuantFormat) -> bool:
    """Whether scales of a format are stored over one divisor of the tensor."""
    return fmt.floats is not None and fmt.floats.scale == "e4m3"


def _parts(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks in their order, so many together as memory is meant to take; at least one."""
    parts, elements = [[tasks[0]]], tasks[0].weight.numel()
    for task in tasks[1:]:
        elements += task.weight.numel()
        if elements > TOGETHER_ELEMENTS:
            parts.append([])
            elements = task.weight.numel()
        parts[-1].append(task)
    return parts


def _as_errors(roundings: InitialRoundings) -> RoundingErrors:
    """D of each rounding, which is let go when it has been used."""
    errors: RoundingErrors = {}
    for name, by_label in roundings.items():
        for label in list(by_label):
            rounding = by_label.pop(label)
            errors.setdefault(name, {})[label] = dequantize(*rounding.rounded).float() - rounding.weight
    return errors
