"""Run single blocks of a model on the tensors that are alive before them, packed into one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.errors import InputError
from hawqtool.model.carried.flow import DataFlow
from hawqtool.model.carried.layout import Layout, Leaf, LeafName
from hawqtool.model.carried.nested import Carried, all_nonzero, mapped, on_meta
from hawqtool.model.carried.stand_ins import BlockReached, stand_ins
from hawqtool.model.carried.trace import FIRST, first_input
from hawqtool.model.replay import Call

Inputs = Mapping[str, Tensor]
"""Arguments of the model by name."""

LoadBlock = Callable[[int], AbstractContextManager[nn.Module]]
"""Gives a block with its weights while the context lasts."""


@dataclass(frozen=True)
class Rows:
    """What all blocks need to know of a batch of rows.

    Args:
        walk: Runs the blocks.
        inputs: Arguments of the model.
        layouts: What is alive behind each block; first comes the place before all of them.
        constants: What depends on the length of rows alone, by name.
        recorded: Arguments of the blocks that need not be computed again, with `Carried` in the place of what comes
            from earlier blocks.
    """

    walk: CarriedWalk
    inputs: Inputs
    layouts: Sequence[Layout]
    constants: Mapping[LeafName, Tensor]
    recorded: dict[int, Call] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class CarriedCall:
    """Call of a block on what is alive before it.

    Args:
        rows: The batch.
        number: Number of the block.
    """

    rows: Rows
    number: int

    def run(self, module: nn.Module, packed: Tensor) -> Tensor:
        """What is alive behind the block, from what is alive before it, ``[rows, positions, width]`` each.

        Args:
            module: The block.
            packed: See `Layout.pack`.
        """
        before, behind = self.rows.layouts[self.number : self.number + 2]
        values = before.unpack(packed)
        args, kwargs = self.rows.walk.arguments(self.rows, self.number, values)
        if torch.is_grad_enabled() and self.number not in self.rows.recorded:
            nothing = packed.flatten()[0] * 0
            large = self._large(args, kwargs)
            args, kwargs = mapped((args, kwargs), lambda tensor: _differentiable(tensor, large, nothing))
        output = module(*args, **kwargs)
        found = self.rows.walk.flow.given[self.number].found((args, kwargs), output)
        return behind.pack(values | found)

    def _large(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Numbers of a hidden state: of the first block's, or of one that begins here."""
        (first,) = self.rows.layouts[0].leaves
        of_first, hidden = torch.Size(first.shape).numel() * self.rows.count, first_input(args, kwargs)
        return of_first if hidden.requires_grad else min(of_first, hidden.numel())


def _differentiable(tensor: Tensor, large: int, nothing: Tensor) -> Tensor:
    """Have linears that see nothing carried, such as a decoder's first, take part in differentiation too.

    Args:
        tensor: An argument of a block's call.
        large: Numbers of a hidden state.
        nothing: A zero that is computed from what is carried.
    """
    if tensor.is_floating_point() and tensor.numel() >= large and not tensor.requires_grad:
        return tensor + nothing.to(tensor.dtype)
    return tensor


class CarriedWalk:
    """Runs what lies outside the blocks of a model, with the blocks' outputs put in.

    Args:
        model: The model, whose blocks may be without weights.
        flow: Its data flow.
        inputs: Arguments of the model by name for rows of tokens.
        load: Loads single blocks.
    """

    def __init__(self, model: nn.Module, flow: DataFlow, inputs: Callable[[Tensor], Inputs], load: LoadBlock) -> None:
        self.model, self.flow, self._inputs, self._load = model, flow, inputs, load
        self._known: dict[int, tuple[Sequence[Layout], dict[LeafName, Tensor], _Shapes]] = {}

    @property
    def needs_ends(self) -> bool:
        """Whether what lies outside the blocks is needed while they are walked."""
        return not all(self.flow.recorded)

    def begin(self, rows: Tensor) -> tuple[Tensor, list[CarriedCall]]:
        """What is alive before the first block, packed, and the calls of the blocks.

        Args:
            rows: Rows of what the model reads.
        """
        batch = self._rows(rows)
        first = self._record(batch)
        return batch.layouts[0].pack({FIRST: first}), [CarriedCall(batch, n) for n in range(len(self.flow.names))]

    def growth(self, rows: Tensor) -> float:
        """Mean size of what is alive before a block, in that of the first block's input."""
        widths = [layout.width for layout in self._rows(rows).layouts[:-1]]
        return sum(widths) / len(widths) / widths[0]

    def outputs(self, rows: Tensor, packed: Tensor) -> Any:
        """What the model gives, from what is alive behind the last block."""
        batch = self._rows(rows)
        values = batch.layouts[-1].unpack(packed)
        with stand_ins(self.model, self.flow.names, self._giving(batch, values)):
            return self.model(**batch.inputs)

    def arguments(self, rows: Rows, number: int, values: Mapping[LeafName, Tensor]) -> Call:
        """Arguments of a block's call, from what is alive before it by name."""
        known = {**rows.constants, **values}
        if number in rows.recorded:
            call: Call = mapped(rows.recorded[number], lambda t: known[t.leaf] if isinstance(t, Carried) else t)
            return call
        reached: list[Call] = []
        give = self._giving(rows, values)

        def called(at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if at == number:
                reached.append((args, kwargs))
                raise BlockReached
            return give(at, args, kwargs)

        with stand_ins(self.model, self.flow.names, called):
            self.model(**rows.inputs)
        return reached[0]

    def _giving(self, rows: Rows, values: Mapping[LeafName, Tensor]) -> Callable[..., Any]:
        """Stands in for blocks: gives what is alive, and NaN for what nothing shall read."""
        known, shapes = {**rows.constants, **values}, self._known[rows.layouts[0].positions][2]

        def tensor(leaf: LeafName) -> Tensor:
            return known[leaf] if leaf in known else shapes.unread(leaf, rows.count)

        return lambda at, args, kwargs: self.flow.given[at].put((args, kwargs), tensor)

    def _record(self, batch: Rows) -> Tensor:
        """Record what calls need not be computed again; the first block's input."""
        shapes = self._known[batch.layouts[0].positions][2]
        names: dict[int, LeafName] = {}
        held: list[Tensor] = []
        first: list[Tensor] = []

        def stand_in(leaf: LeafName) -> Tensor:
            found = shapes.unread(leaf, batch.count)
            names[id(found)] = leaf
            held.append(found)
            return found

        def called(at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not first:
                first.append(first_input(args, kwargs))
                names[id(first[0])] = FIRST
            if self.flow.recorded[at]:
                batch.recorded[at] = mapped((args, kwargs), lambda t: Carried(names[id(t)]) if id(t) in names else t)
            if at == len(self.flow.names) - 1:
                raise BlockReached
            return self.flow.given[at].put((args, kwargs), stand_in)

        with stand_ins(self.model, self.flow.names, called), torch.no_grad():
            self.model(**batch.inputs)
        return first[0]

    def _rows(self, rows: Tensor) -> Rows:
        positions = _positions(rows)
        if positions not in self._known:
            shapes = _Shapes(self, self._inputs(rows[:1]))
            layouts = [shapes.layout(behind, positions) for behind in range(-1, len(self.flow.names))]
            self._known[positions] = layouts, {}, shapes
            self._known[positions][1].update(self._constants(rows))
        known, constants, _ = self._known[positions]
        return Rows(self, self._inputs(rows), known, constants)

    def _constants(self, rows: Tensor) -> dict[LeafName, Tensor]:
        """What depends on the length of rows alone, found on a row and on the same row backwards.

        Raises:
            InputError: If both differ.
        """
        found: dict[LeafName, Tensor] = {}
        layouts, _, shapes = self._known[_positions(rows)]
        for number in sorted({leaf[0] for leaf in self.flow.constants}):
            given = []
            with self._load(number) as block, torch.no_grad():
                for row in (rows[:1], rows[:1].flip(1)):
                    batch = Rows(self, self._inputs(row), layouts, found)
                    self._record(batch)
                    zeros = {leaf.name: leaf.zeros(shapes.device) for leaf in layouts[number].leaves}
                    args, kwargs = self.arguments(batch, number, zeros)
                    given.append(self.flow.given[number].found((args, kwargs), block(*args, **kwargs)))
            for leaf in self.flow.constants:
                if leaf[0] == number:
                    if not torch.equal(given[0][leaf], given[1][leaf]):
                        raise InputError(f"{self.flow.names[number]} hands on a value that differs from row to row")
                    found[leaf] = given[0][leaf]
        return found


def _positions(rows: Tensor) -> int:
    """Positions by which what is carried is packed: tokens of a row; all samples of a sound are one."""
    return 1 if rows.is_floating_point() and rows.ndim == 2 else int(rows.shape[1])


def _meta_copy(block: nn.Module) -> nn.Module:
    """A copy of a block, as it is configured now, on the meta device."""
    tensors: list[Any] = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor.detach().to("meta") for tensor in tensors})


class _Shapes:
    """Shapes and dtypes of what blocks give for one row of a length, by name.

    Args:
        walk: Runs the model.
        inputs: Arguments of the model for one row.
    """

    def __init__(self, walk: CarriedWalk, inputs: Inputs) -> None:
        self.flow, self._of = walk.flow, dict[LeafName, Tensor]()
        self.device = next(iter(inputs.values())).device
        blocks = [walk.model.get_submodule(name) for name in self.flow.names]

        def called(at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if at == 0:
                self._of[FIRST] = first_input(args, kwargs).to("meta")
            moved = on_meta((args, kwargs))
            output = _meta_copy(blocks[at])(*moved[0], **moved[1])
            self._of |= self.flow.given[at].found(moved, output)
            if at == len(self.flow.names) - 1:
                raise BlockReached
            return self.flow.given[at].put((args, kwargs), lambda leaf: self.unread(leaf, 1))

        with stand_ins(walk.model, self.flow.names, called), torch.no_grad(), all_nonzero():
            walk.model(**inputs)

    def layout(self, behind: int, positions: int) -> Layout:
        """What is alive behind a block."""
        names = self.flow.alive(behind)
        found = (Leaf(n, tuple(self._of[n].shape), self._of[n].dtype, *self.flow.places[n]) for n in names)
        return Layout(tuple(found), positions)

    def unread(self, leaf: LeafName, rows: int) -> Tensor:
        """NaN, or zeros of an integer dtype, in the shape of what a block gives; takes no memory."""
        known = self._of[leaf]
        shape = list(known.shape)
        if leaf in self.flow.places:
            shape[self.flow.places[leaf][0]] = rows
        filler = torch.nan if known.dtype.is_floating_point else 0
        return torch.full((), filler, dtype=known.dtype, device=self.device).expand(shape)
