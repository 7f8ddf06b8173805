"""Reading the next block's weights while the current one is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from hawqtool.checkpoint.reader import TensorReader

_THREADS = 8
"""Readers: one copies and hashes about 0.9 GB/s from the page cache, less than some walks of a GPU use up."""


class Prefetcher:
    """A source of weights that reads ahead in threads of its own what it was told to expect.

    At most one expected set is kept, so it holds no more than the tensors of one block.

    Args:
        reader: Reads the tensors.
        pinned: Whether what is read ahead lies in page-locked memory, from which a GPU copies without waiting.
    """

    def __init__(self, reader: TensorReader, pinned: bool = False) -> None:
        self._reader, self._pinned = reader, pinned
        self._threads = ThreadPoolExecutor(_THREADS, "weights")
        self._expected: dict[str, Future[Tensor]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def expect(self, names: Sequence[str]) -> None:
        """Begin to read tensors that will be asked for next, in this order; what was expected before is dropped."""
        for future in self._expected.values():
            future.cancel()
        self._expected = {name: self._threads.submit(self._reader.tensor, name, self._pinned) for name in names}

    def tensor(self, name: str) -> Tensor:
        """Tensor on the CPU in the source dtype; read now where it was not expected.

        Raises:
            InputError: As `TensorReader.tensor`, also for what failed ahead of time.
        """
        future = self._expected.pop(name, None)
        return self._reader.tensor(name) if future is None else future.result()
