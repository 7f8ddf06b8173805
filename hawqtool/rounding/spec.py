"""How a model is rounded: method, formats and stored dtypes, applied to the input groups of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.formats import QuantFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.records import LinearSpec, Menu, OutputMoments, UnitFormats
from hawqtool.rounding.factor import Factor, factorize, factorize_alike
from hawqtool.rounding.floats.scale_search import common_divisor
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.lattice import begin_on_grid, on_grid
from hawqtool.rounding.layer import round_groups
from hawqtool.rounding.method import RoundingMethod, Task, TaskGroup
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

_ALIKE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Most memory of the groups of experts that are rounded together."""

InputGroup = tuple[Sequence[LinearSpec], GroupStatistics]
"""Linears that share an input, with the statistics of that input."""

InputGroups = Iterable[InputGroup]


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

    def parts(self, groups: InputGroups) -> Iterator[list[InputGroup]]:
        """Input groups to be rounded together: experts of one form, as many as memory is meant to take; others alone.

        The order is that of the groups, but for experts, which come when there are enough of a form.
        """
        waiting: dict[object, list[InputGroup]] = {}
        for group, statistics in groups:
            if not is_expert(group[0].name):
                yield [(group, statistics)]
                continue
            form = tuple((linear.unit, linear.out_features, linear.in_features) for linear in group)
            alike = waiting.setdefault(form, [])
            alike.append((group, statistics))
            if (len(alike) + 1) * self._bytes(group) > _ALIKE_BYTES[statistics.gram.device.type]:
                yield waiting.pop(form)
        yield from waiting.values()

    def _bytes(self, group: Sequence[LinearSpec]) -> int:
        """Memory that rounding a group takes, about: matrices of its inputs in float64, weights and codes."""
        formats = len(self.formats_of(group[0]))
        return 28 * group[0].in_features ** 2 + (4 + formats) * sum(linear.num_weights for linear in group)

    def tasks(self, block: LoadedBlock, group: Sequence[LinearSpec]) -> list[Task]:
        """The linears of an input group to be rounded, once for each of their formats."""
        return self.tasks_of(block, [group])[0]

    def tasks_of(self, block: LoadedBlock, groups: Sequence[Sequence[LinearSpec]]) -> list[list[Task]]:
        """The same of several groups; experts of quantized originals that lie on the grid of a format stay as they are.

        Whether they do is asked for all of one width together, which is a hundred small operations.
        """
        tasks = [self._tasks(block, group) for group in groups]
        alike: dict[object, list[tuple[int, int]]] = {}
        for number, of_group in enumerate(tasks):
            for index, task in ((i, task) for i, task in enumerate(of_group) if is_expert(task.name)):
                form = task.quant_format, task.stored_dtype, task.weight.shape[1]
                alike.setdefault(form, []).append((number, index))
        for places in alike.values():
            first = tasks[places[0][0]][places[0][1]]
            grid = first.quant_format, first.stored_dtype
            begins = begin_on_grid([tasks[n][i].weight for n, i in places], *grid)
            for number, index in (place for place, likely in zip(places, begins, strict=True) if likely):
                task = tasks[number][index]
                tasks[number][index] = replace(task, given=on_grid(task.weight, *grid))
        return tasks

    def _tasks(self, block: LoadedBlock, group: Sequence[LinearSpec]) -> list[Task]:
        """The linears of a group in their formats, whatever grid they lie on."""
        wanted = [linear for linear in group if self.formats_of(linear)]
        weights = {linear.name: block.weight(linear) for linear in wanted}
        divided = {linear.unit for linear in wanted if any(map(_has_divisor, self.formats_of(linear)))}
        divisors = {unit: self.divisors.get(unit) or unit_divisor(block, unit) for unit in divided}
        tasks = [
            Task(linear.name, weights[linear.name], fmt, self.stored_dtypes[linear.name])
            for linear in wanted
            for fmt in self.formats_of(linear)
        ]
        units = [linear.unit for linear in wanted for _ in self.formats_of(linear)]
        pairs = zip(tasks, units, strict=True)
        return [replace(t, divisor=divisors[unit]) if _has_divisor(t.quant_format) else t for t, unit in pairs]

    def on_block(self, block: LoadedBlock) -> RoundingSpec:
        """The same with what depends on all original weights of a fused set, which are about to be replaced."""
        wanted = (linear.unit for linear in block.spec.linears if any(map(_has_divisor, self.formats_of(linear))))
        return replace(self, divisors={unit: unit_divisor(block, unit) for unit in dict.fromkeys(wanted)})

    def factor(self, tasks: Sequence[Task], statistics: GroupStatistics) -> Factor:
        """Factor of the Gram matrix behind some tasks.

        Raises:
            NumericalError: If there is none; names the first of the layers.
        """
        return factorize(statistics.gram, statistics.num_tokens, self.method.damping, name=tasks[0].name)

    def task_groups(self, block: LoadedBlock, part: Sequence[InputGroup]) -> list[TaskGroup | None]:
        """What is to be rounded of each of some groups (see `parts`), with its factor; None where that is nothing.

        Raises:
            NumericalError: If there is no factor; names the first of the layers.
        """
        pairs = list(zip(self.tasks_of(block, [group for group, _ in part]), (s for _, s in part), strict=True))
        wanted = [(tasks, statistics) for tasks, statistics in pairs if tasks]
        factors = iter(
            factorize_alike(
                [statistics.gram for _, statistics in wanted],
                [statistics.num_tokens for _, statistics in wanted],
                self.method.damping,
                [tasks[0].name for tasks, _ in wanted],
            )
        )
        return [TaskGroup(tasks, next(factors), statistics) if tasks else None for tasks, statistics in pairs]

    def roundings(
        self, block: LoadedBlock, group: Sequence[LinearSpec], statistics: GroupStatistics
    ) -> InitialRoundings:
        """Roundings of one input group in all its formats, not refined."""
        return self.roundings_of(block, [(group, statistics)])[0]

    def roundings_of(self, block: LoadedBlock, part: Sequence[InputGroup]) -> list[InitialRoundings]:
        """The same of each of some groups (see `parts`)."""
        found: list[InitialRoundings] = []
        groups = self.task_groups(block, part)
        # What is large is rounded in several steps, experts together in one.
        steps = [group._replace(tasks=tasks) for group in groups if group for tasks in _parts(group.tasks)]
        together = [steps] if len(groups) > 1 else [[step] for step in steps]
        rounded = (of_step for chosen in together for of_step in round_groups(chosen, self.method))
        for group in groups:
            by_name: InitialRoundings = {}
            for tasks in _parts(group.tasks) if group else ():
                for task, one in zip(tasks, next(rounded), strict=True):
                    rounding = InitialRounding(task.name, task.weight, one, task.quant_format)
                    by_name.setdefault(task.name, {})[task.quant_format.label] = rounding
            found.append(by_name)
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
        for part in self.parts(groups):
            for of_group in self.roundings_of(block, part):
                found |= of_group
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
