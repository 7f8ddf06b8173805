"""Data flow between the blocks of a model: what is alive behind each, and where a later block finds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.errors import InputError, one_line
from hawqtool.model.block_list import TOKENS, TRACE_ERRORS, block_lists, example_row, run_on_zeros
from hawqtool.model.carried.layout import LeafName
from hawqtool.model.carried.nested import leaves, mapped
from hawqtool.model.carried.stand_ins import BlockReached, Given, stand_ins
from hawqtool.model.carried.trace import FIRST, Trace, Traced
from hawqtool.model.inputs.arguments import row_format
from hawqtool.model.kept import is_linear
from hawqtool.model.replay import Call
from hawqtool.model.tasks import traced_output

_ROWS = 2
"""Rows of the second traced run, which has one position more too: what has grown is known by its size."""


@dataclass(frozen=True)
class DataFlow:
    """What the blocks of a model read of each other.

    Args:
        names: Names of the blocks in the order of their calls.
        given: What each gives.
        reads: What each reads of earlier blocks and, last, what the outputs are computed from; no constants.
        recorded: Whether its arguments are what was given, or do not depend on blocks; others are computed again.
        places: Dimensions of the rows and, where there is one, of the positions of everything that is read.
        constants: What is read and depends neither on the rows nor on a linear, such as a table of position biases.
    """

    names: tuple[str, ...]
    given: tuple[Given, ...]
    reads: tuple[frozenset[LeafName], ...]
    recorded: tuple[bool, ...]
    places: Mapping[LeafName, tuple[int, int | None]]
    constants: frozenset[LeafName]

    def alive(self, behind: int) -> tuple[LeafName, ...]:
        """What is read later than by a block, the latest given first; -1 stands for the place before all blocks."""
        later = {leaf for reads in self.reads[behind + 1 :] for leaf in reads if leaf[0] <= behind}
        return tuple(sorted(later, key=lambda leaf: (-leaf[0], leaf[1])))


def trace_flow(model: Any) -> tuple[DataFlow, Traced]:
    """Data flow of a model, and one of the two runs on zeros that it is found by.

    Args:
        model: Skeleton; its blocks lose their buffers here.

    Raises:
        InputError: If it cannot be run, if a block is called twice, or if what is read cannot be carried row by row.
    """
    kind = type(model).__name__
    names = [name for name, module in _candidates(model).items()]
    first = _traced(model, names, 1, TOKENS)
    called = [block.name for block in first.blocks]
    for name in called:
        if called.count(name) > 1:
            raise InputError(f"{kind}: {name} is called more than once; not supported")
    if not called:
        raise InputError(f"{kind}: no list of blocks is run; this architecture is not supported")
    second = _traced(model, called, _ROWS, TOKENS + 1)
    if [block.name for block in second.blocks] != called:
        raise InputError(f"{kind}: other blocks run on other rows; not supported")
    flow = _flow(kind, first, second, TOKENS + len(row_format(model).image))
    _Probe(model, flow, first).check()
    return flow, first


def with_zeros(model: Any, traced: Traced) -> AbstractContextManager[None]:
    """A context in which zeros stand for what blocks give, in the shapes of a traced run."""

    def stand_in(leaf: LeafName) -> Tensor:
        return torch.zeros((), dtype=traced.dtypes[leaf]).expand(traced.shapes[leaf])

    names = [block.name for block in traced.blocks]
    return stand_ins(
        model, names, lambda number, args, kwargs: traced.blocks[number].given.put((args, kwargs), stand_in)
    )


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Members by name of the lists that may hold blocks: those with linears."""
    lists = block_lists(model)
    return {
        f"{name}.{number}": element
        for name, found in lists.items()
        if any(is_linear(module) for module in found.modules())
        for number, element in enumerate(found)
    }


def _traced(model: Any, names: Sequence[str], rows: int, tokens: int) -> Traced:
    modules = [model.get_submodule(name) for name in names]
    trace = Trace(model, names, modules)
    try:
        return trace.run(partial(_outputs, model, rows, tokens, True))
    except TRACE_ERRORS as error:
        where = f"after block {len(trace.found) - 1}" if trace.found else "at the first block"
        raise InputError(
            f"{type(model).__name__}: cannot be traced {where} as config.json describes it: {one_line(error)}; "
            "this architecture is not supported"
        ) from error


def _outputs(model: Any, rows: int, tokens: int, differentiable: bool) -> Any:
    result = run_on_zeros(model, example_row(model, rows, tokens), differentiable)
    return traced_output(model, result)


def _flow(kind: str, first: Traced, second: Traced, positions: int) -> DataFlow:
    names = tuple(block.name for block in first.blocks)
    constants = first.constants & second.constants
    recorded = tuple(n == 0 or not (b.derives - constants or b.outside) for n, b in enumerate(first.blocks))
    # What is computed again finds the first block's input in the rows.
    reads = [b.reads if kept else b.reads - {FIRST} for b, kept in zip(first.blocks, recorded, strict=True)]
    reads.append(first.tail - {FIRST})
    read = frozenset[LeafName]().union(*reads)
    for leaf in read & constants:
        sizes = zip(first.shapes[leaf], second.shapes.get(leaf, ()), strict=False)
        if any(before > 1 and after == _ROWS * before for before, after in sizes):
            raise InputError(
                f"{kind}: block {names[leaf[0]]} hands on a value of shape {list(first.shapes[leaf])} that holds rows "
                "and heads in one dimension, and that later blocks read; not supported"
            )
    places = {}
    for leaf in read - constants:
        place = _place(first.shapes[leaf], second.shapes.get(leaf, ()), positions)
        if place is None:
            raise InputError(
                f"{kind}: block {names[leaf[0]]} hands on a value of shape {list(first.shapes[leaf])} that is no row's "
                "own, and that later blocks read; not supported"
            )
        places[leaf] = place
    given = tuple(block.given for block in first.blocks)
    return DataFlow(names, given, tuple(r - constants for r in reads), recorded, places, read & constants)


def _place(shape: Sequence[int], larger: Sequence[int], positions: int) -> tuple[int, int | None] | None:
    """Dimensions of rows and of positions by the shapes in both runs; None where rows have no dimension."""
    if len(shape) != len(larger):
        return None
    rows = [d for d, sizes in enumerate(zip(shape, larger, strict=True)) if sizes == (1, _ROWS)]
    tokens = [d for d, sizes in enumerate(zip(shape, larger, strict=True)) if sizes == (positions, positions + 1)]
    if len(rows) != 1:
        return None
    return rows[0], tokens[0] if tokens else None


class _Probe:
    """Runs a model with NaN in the place of what is not handed on: it must arrive nowhere."""

    def __init__(self, model: Any, flow: DataFlow, traced: Traced) -> None:
        self.model, self.flow, self.traced = model, flow, traced

    def check(self) -> None:
        """Check every block's arguments and the outputs.

        Raises:
            InputError: Naming what reads an output that is not carried.
        """
        calls, _ = self._calls(lambda _: False, len(self.flow.names))
        for number, (call, recorded) in enumerate(zip(calls, self.flow.recorded, strict=True)):
            if recorded:
                self._check(self.flow.names[number], self._unread(call))
                self._check_integers(number, call)
        again = [number for number, recorded in enumerate(self.flow.recorded) if not recorded]
        for number in (*again, len(self.flow.names)):
            alive = frozenset(self.flow.alive(number - 1)) | self.flow.constants
            calls, result = self._calls(alive.__contains__, number)
            if number < len(self.flow.names):
                self._check(self.flow.names[number], calls[number])
            else:
                self._check("the part behind the blocks", result)

    def _calls(self, alive: Callable[[LeafName], bool], last: int) -> tuple[list[Call], Any]:
        """Calls of the blocks up to one, and the outputs where that is none."""
        calls: list[Call] = []
        self.standing: dict[int, Tensor] = {}

        def stand_in(leaf: LeafName) -> Tensor:
            dtype = self.traced.dtypes[leaf]
            filler = 0 if alive(leaf) else torch.nan if dtype.is_floating_point else 1
            found = torch.full((), filler, dtype=dtype).expand(self.traced.shapes[leaf])
            self.standing[id(found)] = found
            return found

        def called(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(mapped((args, kwargs), lambda tensor: tensor))
            if number == last:
                raise BlockReached
            return self.flow.given[number].put((args, kwargs), stand_in)

        result = None
        with stand_ins(self.model, self.flow.names, called):
            result = _outputs(self.model, 1, TOKENS, False)
        return calls, result

    def _unread(self, call: Call) -> list[Tensor]:
        return [tensor for tensor in leaves(call) if id(tensor) not in self.standing]

    def _check(self, reader: str, value: Any) -> None:
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in leaves(value)):
            raise InputError(
                f"{type(self.model).__name__}: {reader} depends on an output of an earlier block in a way that is not "
                "seen; not supported"
            )

    def _check_integers(self, number: int, call: Call) -> None:
        """Integers that blocks give are ones here and were zeros before: arguments made from them differ."""
        for tensor, before in zip(leaves(call), leaves(self.traced.blocks[number].call), strict=True):
            integer = not tensor.is_floating_point() and id(tensor) not in self.standing
            if integer and not torch.equal(tensor, before):
                self._check(self.flow.names[number], torch.tensor(torch.nan))
