"""A function that is called over and over as a graph of a GPU's kernels, where the host takes longer to launch them.

Output feedback rounds a layer by blocks of rows, about 180 kernels each, of which a GPU has most done in 3 µs and the
host launches none in less than 5. They are the same for every block, so they are recorded at the second one, and the
same kernels on other values give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, ...]]
"""From a tensor to tensors, the same kernels for all values; it waits for nothing."""


class Recording:
    """A function's kernels, recorded once.

    Args:
        function: The function, which was called before: what it compiles or keeps is there.
        example: A tensor on a GPU, whose shape and dtype all others have.
    """

    def __init__(self, function: Function, example: Tensor) -> None:
        stream, pool, _ = _shared(example.device)
        self._given = example.clone()
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            # Other threads may go on with what a recording must not do, such as to read the next block.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._found = function(self._given)
            except BaseException:
                with suppress(RuntimeError):  # of the spoiled recording: what spoiled it, such as full memory, is told
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        torch.cuda.current_stream(example.device).wait_stream(stream)

    def __call__(self, value: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, in tensors of their own."""
        self._given.copy_(value)
        self._graph.replay()
        return tuple(part.clone() for part in self._found)


class Repeated:
    """A function that is recorded when it is called again on a tensor of the same shape.

    Args:
        function: The function.
        record: Records it.
    """

    def __init__(self, function: Function, record: Callable[[Function, Tensor], Function] = Recording) -> None:
        self._function, self._record = function, record
        self._recordings: dict[torch.Size, Function | None] = {}

    def __call__(self, value: Tensor) -> tuple[Tensor, ...]:
        """What the function gives."""
        shape = value.shape
        if shape not in self._recordings:
            self._recordings[shape] = None
            return self._function(value)
        recording = self._recordings[shape]
        if recording is None:
            try:
                recording = self._record(self._function, value)
            except torch.OutOfMemoryError:  # a recording gets nothing of the memory that others keep unused
                recording = self._function
            self._recordings[shape] = recording
        return recording(value)


class _Shared(NamedTuple):
    """What all recordings of a device share: a stream, and memory, since one is replayed at a time."""

    stream: torch.cuda.Stream
    pool: Any
    first: torch.cuda.CUDAGraph
    """A recording without which the memory would be given back with the last one."""


@lru_cache(maxsize=8)
def _shared(device: torch.device) -> _Shared:
    stream, pool, first = torch.cuda.Stream(device), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        ones = torch.ones(8, 8, dtype=torch.float32, device=device)
        ones.addmm_(ones.clone(), ones.clone())  # the libraries' buffers exist before the first recording
        first.capture_begin(pool=pool, capture_error_mode="thread_local")
        ones.add_(1)
        first.capture_end()
    return _Shared(stream, pool, first)
