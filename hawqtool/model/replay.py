"""Run the parts of a model outside its blocks by replaying the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Replay(nn.Module):
    """Stands in for a block: records the keyword arguments of the call and returns a given hidden state."""

    def __init__(self, block: nn.Module, output: Tensor | None, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]):
        super().__init__()
        self._stand_in_for = (block,)  # a tuple, so that the block is not registered as a child
        self._output, self._calls = output, calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stand_in_for[0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append(((hidden, *args), kwargs))
        return hidden if self._output is None else self._output


@contextmanager
def replayed_blocks(
    blocks: nn.ModuleList, output: Tensor | None = None
) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Replace every block by a stand-in while the context lasts.

    Args:
        blocks: The model's list of blocks.
        output: What the last block is to return; None passes the input on.

    Yields:
        The recorded calls, ``(args, kwargs)`` per block, ``args[0]`` being the hidden state.
    """
    originals = list(blocks)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    last = len(originals) - 1
    try:
        for index, block in enumerate(originals):
            blocks[index] = _Replay(block, output if index == last else None, calls)
        yield calls
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
