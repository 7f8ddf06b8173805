"""Run the parts of a model outside its blocks by replaying the blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block's call; the hidden state comes first."""


ExtraOutputs = tuple[bool, ...] | None
"""Which of the values that blocks return beside the hidden state are tensors; None where a block returns that alone."""


class _LastBlock(Exception):
    """Nothing behind the last block is to be run."""


class _Replay(nn.Module):
    """Stands in for a block: records the arguments of the call and returns a given hidden state."""

    def __init__(
        self, block: nn.Module, output: Tensor | None, calls: list[Call], extra_outputs: ExtraOutputs, ends: bool
    ) -> None:
        super().__init__()
        self._stand_in_for = (block,)  # a tuple, so that the block is not registered as a child
        self._output, self._calls, self._extra_outputs, self._ends = output, calls, extra_outputs, ends

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stand_in_for[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        self._calls.append(((hidden, *rest), kwargs))
        if self._ends:
            raise _LastBlock
        result = hidden if self._output is None else self._output
        if self._extra_outputs is None:
            return result
        # What reads a value that is not carried shall not go unnoticed.
        unread = result.new_full((), math.nan)
        return (result, *(unread if is_tensor else None for is_tensor in self._extra_outputs))


@contextmanager
def replayed_blocks(
    blocks: nn.ModuleList, extra_outputs: ExtraOutputs, output: Tensor | None = None, ends: bool = False
) -> Iterator[list[Call]]:
    """Replace every block by a stand-in while the context lasts.

    Args:
        blocks: The model's list of blocks.
        extra_outputs: What a block returns beside the hidden state: NaN stands for tensors, which nothing may read.
        output: What the last block is to return; None passes the input on.
        ends: Whether the call of the last block ends the context: what follows, such as a large head, is not run.

    Yields:
        The recorded calls, ``(args, kwargs)`` per block, ``args[0]`` being the hidden state.
    """
    originals = list(blocks)
    calls: list[Call] = []
    last = len(originals) - 1
    try:
        for index, block in enumerate(originals):
            returned = output if index == last else None
            blocks[index] = _Replay(block, returned, calls, extra_outputs, ends and index == last)
        yield calls
    except _LastBlock:
        pass
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
