"""Run a model with something else in the place of its blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from hawqtool.model.carried.layout import LeafName
from hawqtool.model.carried.nested import Carried, mapped, mappings


class BlockReached(Exception):
    """The call that was wanted is there; nothing behind it is to be run."""


Called = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Takes the number of a block and the arguments of its call; gives what the block returns."""


@dataclass(frozen=True)
class Given:
    """What a block gives, with `Carried` in the place of tensors.

    Args:
        output: What it returns.
        writes: What it puts into mappings among its arguments: number of the mapping, key and value.
    """

    output: Any
    writes: tuple[tuple[int, Any, Any], ...]

    def put(self, call: Any, tensor: Callable[[LeafName], Tensor]) -> Any:
        """Do as the block does: write into the mappings of a call, and return the output."""
        targets = list(mappings(call))
        for number, key, value in self.writes:
            targets[number][key] = mapped(value, lambda found: tensor(found.leaf))
        return mapped(self.output, lambda found: tensor(found.leaf))

    def found(self, call: Any, output: Any) -> dict[LeafName, Tensor]:
        """The tensors by name after a call of the block."""
        targets, values = list(mappings(call)), dict[LeafName, Tensor]()
        _pair(self.output, output, values)
        for number, key, value in self.writes:
            _pair(value, targets[number][key], values)
        return values


def _pair(template: Any, value: Any, into: dict[LeafName, Tensor]) -> None:
    if isinstance(template, Carried):
        into[template.leaf] = value
    elif isinstance(template, tuple | list):
        for part, found in zip(template, value, strict=True):
            _pair(part, found, into)
    elif hasattr(template, "items"):
        for key, part in template.items():
            _pair(part, value[key], into)


class _StandIn(nn.Module):
    """Stands in for a block, with its attributes."""

    def __init__(self, block: nn.Module, number: int, called: Called) -> None:
        super().__init__()
        self._stand_in_for = (block,)  # a tuple, so that the block is not registered as a child
        self._number, self._called = number, called
        # By these transformers collects hidden states; while something stands in, the block itself gives none.
        self._forward_hooks, block._forward_hooks = block._forward_hooks, OrderedDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stand_in_for[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = [_without_empty_cache(value) for value in args]
        return self._called(self._number, tuple(kept), {n: _without_empty_cache(v) for n, v in kwargs.items()})


def _without_empty_cache(value: Any) -> Any:
    """None for a cache of keys and values that holds none: some models make one whatever they are told."""
    return None if isinstance(value, Cache | EncoderDecoderCache) and not value.get_seq_length() else value


@contextmanager
def stand_ins(model: nn.Module, names: Sequence[str], called: Called) -> Iterator[None]:
    """While the context lasts, calls of blocks are calls of a function; `BlockReached` ends the context.

    Args:
        model: The model.
        names: Names of its blocks, members of module lists.
        called: Takes the calls.
    """
    places: list[tuple[Any, int]] = []
    for name in names:
        path, _, last = name.rpartition(".")
        places.append((model.get_submodule(path), int(last)))
    blocks = [owner[number] for owner, number in places]
    try:
        for position, ((owner, number), block) in enumerate(zip(places, blocks, strict=True)):
            owner[number] = _StandIn(block, position, called)
        yield
    except BlockReached:
        pass
    finally:
        for (owner, number), block in zip(places, blocks, strict=True):
            if owner[number] is not block:
                block._forward_hooks = owner[number]._forward_hooks
            owner[number] = block
