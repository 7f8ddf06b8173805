"""Trace what blocks hand on: which of a block's outputs which later block reads, and how it gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hawqtool.errors import InputError
from hawqtool.model.carried.layout import LeafName
from hawqtool.model.carried.nested import Carried, leaves, mapped, mappings
from hawqtool.model.carried.stand_ins import Given, stand_ins
from hawqtool.model.kept import is_linear
from hawqtool.model.replay import Call

FIRST: LeafName = (-1, 0)
"""The first block's input, which comes from what lies before the blocks."""


@dataclass(frozen=True)
class BlockTrace:
    """One block in a traced run.

    Args:
        name: Its name.
        call: Arguments of its call, as they were then.
        given: What it gives.
        refers: What of earlier blocks is among its arguments as it was given.
        derives: What of earlier blocks its other arguments are computed from, outside the blocks.
        outside: Whether an argument as large as a hidden state comes from outside the blocks.
    """

    name: str
    call: Call
    given: Given
    refers: frozenset[LeafName]
    derives: frozenset[LeafName]
    outside: bool

    @property
    def reads(self) -> frozenset[LeafName]:
        """All of earlier blocks that it needs."""
        return self.refers | self.derives


@dataclass(frozen=True)
class Traced:
    """A traced run.

    Args:
        blocks: The blocks in the order of their calls.
        shapes: Shape of what was given, by name.
        dtypes: Its dtype.
        constants: What depends neither on the rows nor on a linear.
        tail: What of the blocks the outputs are computed from.
    """

    blocks: tuple[BlockTrace, ...]
    shapes: Mapping[LeafName, tuple[int, ...]]
    dtypes: Mapping[LeafName, torch.dtype]
    constants: frozenset[LeafName]
    tail: frozenset[LeafName]


class Trace:
    """Runs a model with zeros in the place of what its blocks give; the blocks themselves run on the meta device.

    Args:
        model: The model.
        names: Names of blocks, and of what may be one.
        blocks: The modules that run; they are moved to the meta device.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], blocks: Sequence[nn.Module]) -> None:
        self.model, self.names, self.blocks = model, names, blocks
        self.found: list[BlockTrace] = []
        self.shapes: dict[LeafName, tuple[int, ...]] = {}
        self.dtypes: dict[LeafName, torch.dtype] = {}
        self.constants: set[LeafName] = set()
        self._names_of: dict[int, LeafName] = {}
        self._held: list[Any] = []  # so that no identity is used twice
        self._roots: dict[LeafName, Tensor] = {}
        self._largest = self._large = 0

    def run(self, outputs: Callable[[], Any]) -> Traced:
        """Trace one run.

        Args:
            outputs: Runs the model and gives what it is judged by.
        """
        with torch.enable_grad(), stand_ins(self.model, self.names, self._called):
            result = outputs()
            refers, derives = self._sources(result)
        constants = frozenset(self.constants)
        return Traced(tuple(self.found), self.shapes, self.dtypes, constants, (refers | derives) - constants)

    def _called(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.found:
            first = first_input(args, kwargs)
            self._names_of[id(first)], self._largest = FIRST, first.numel()
            self.shapes[FIRST], self.dtypes[FIRST] = tuple(first.shape), first.dtype
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise InputError(f"{self.names[number]} is called with a cache of keys and values; not supported")
        refers, derives = self._sources((args, kwargs))
        hidden = first_input(args, kwargs)
        # A decoder, or a second tower, begins with a hidden state of its own size.
        begins = id(hidden) not in self._names_of and not hidden.requires_grad
        self._large = min(self._largest, hidden.numel()) if begins else self._largest
        call = mapped((args, kwargs), lambda tensor: tensor)
        self._held.append(call)
        outside = any(self._is_outside(tensor) for tensor in leaves(call))
        given = self._run_block(number, len(self.found), call)
        trace = BlockTrace(self.names[number], call, given, refers, derives, outside)
        self.found.append(trace)
        return given.put((args, kwargs), self._alias)

    def _is_outside(self, tensor: Tensor) -> bool:
        fresh = id(tensor) not in self._names_of and not tensor.requires_grad
        return fresh and tensor.is_floating_point() and tensor.numel() >= self._large

    def _sources(self, value: Any) -> tuple[frozenset[LeafName], frozenset[LeafName]]:
        """What of the blocks is in a value as it was given, and what the rest of it is computed from."""
        refers, derives = set(), set()
        for tensor in leaves(value):
            name = self._names_of.get(id(tensor))
            if name is not None:
                refers.add(name)
            elif tensor.requires_grad:
                derives.update(connected(tensor, self._roots))
        return frozenset(refers), frozenset(derives)

    def _run_block(self, number: int, position: int, call: Call) -> Given:
        """What a block gives; new tensors get names."""
        originals: dict[int, Tensor] = {}
        twins: dict[int, Tensor] = {}

        def on_meta(tensor: Tensor) -> Tensor:
            if id(tensor) not in twins:
                twin = tensor.detach().to("meta")
                name = self._names_of.get(id(tensor))
                moves = tensor.requires_grad and name not in self.constants or name == FIRST
                twin.requires_grad_(tensor.is_floating_point() and (moves or self._is_outside(tensor)))
                twins[id(tensor)], originals[id(twin)] = twin, tensor
            return twins[id(tensor)]

        args, kwargs = mapped(call, on_meta)
        held = [(m, dict(m)) for m in mappings((args, kwargs))]
        block = self.blocks[number].to("meta")
        with _trainable_linears(block) as weights:
            output = block(*args, **kwargs)
            moving = {n: t for n, t in enumerate([*weights, *(t for t in twins.values() if t.requires_grad)])}
            place = 0

            def named(tensor: Tensor) -> Carried:
                nonlocal place
                source = originals.get(id(tensor))
                known = None if source is None else self._names_of.get(id(source))
                if known is not None:
                    return Carried(known)
                name, place = (position, place), place + 1
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
                if tensor.is_floating_point() and not connected(tensor, moving):
                    self.constants.add(name)
                return Carried(name)

            template = mapped(output, named)
            writes = [
                (number, key, mapped(m[key], named))
                for number, (m, before) in enumerate(held)
                for key in m
                if key not in before or not _same(m[key], before[key])
            ]
        return Given(template, tuple(writes))

    def _alias(self, name: LeafName) -> Tensor:
        """What stands for a tensor that a block gave: an alias, because its identity is what is looked for."""
        root = self._roots.get(name)
        if root is None:
            root = torch.zeros((), dtype=self.dtypes[name]).expand(self.shapes[name])
            root = root.requires_grad_(root.is_floating_point())
            self._roots[name] = root
        found = root.view_as(root)
        self._names_of[id(found)] = name
        self._held.append(found)
        return found


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Hidden state among the arguments of a block's call."""
    if "hidden_states" in kwargs and not args:
        return kwargs["hidden_states"]
    return next(leaf for leaf in leaves((args, kwargs)) if leaf.is_floating_point())


def connected(tensor: Tensor, roots: Mapping[Any, Tensor]) -> set[Any]:
    """Names of the tensors that one is computed from, by automatic differentiation."""
    trained = {name: root for name, root in roots.items() if root.requires_grad}
    if not trained or not tensor.requires_grad:
        return set()
    found = torch.autograd.grad(tensor.sum(), list(trained.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def _same(value: Any, other: Any) -> bool:
    first, second = list(leaves(value)), list(leaves(other))
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


@contextmanager
def _trainable_linears(block: nn.Module) -> Iterator[list[Tensor]]:
    """While the context lasts, the weights of a block's linears require gradients."""
    linears: list[Any] = [module for module in block.modules() if is_linear(module)]
    weights: list[Tensor] = [linear.weight for linear in linears]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
