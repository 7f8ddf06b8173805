"""Reading the next block's weights while the current one is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

_THREADS = 8
"""Readers: one copies and hashes about 0.9 GB/s from the page cache, less than some walks of a GPU use up."""


class Reader(Protocol):
    """What is read from."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str, pinned: bool = False) -> Tensor:
        """Tensor of that name."""


class Prefetcher:
    """A source of weights that reads ahead in threads of its own what it was told to expect.

    At most one expected set is kept, so it holds no more than the tensors of the blocks that were named last.

    Args:
        reader: Reads the tensors.
        pinned: Whether what is read ahead lies in page-locked memory, from which a GPU copies without waiting.
    """

    def __init__(self, reader: Reader, pinned: bool = False) -> None:
        self._reader, self._pinned = reader, pinned
        self._threads = ThreadPoolExecutor(_THREADS, "weights")
        self._expected: dict[str, Future[Tensor]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def expect(self, names: Sequence[str], pinned: bool | None = None) -> None:
        """Begin to read tensors that will be asked for next, in this order; what else was expected is dropped.

        Args:
            names: Their names.
            pinned: Whether they lie in page-locked memory, which is never given back (default: as told at first).
        """
        pinned = self._pinned if pinned is None else pinned
        earlier, self._expected = self._expected, {}
        wanted = dict.fromkeys(names)
        for name, future in earlier.items():
            if name not in wanted:
                future.cancel()
        for name in wanted:
            known = earlier.get(name)
            self._expected[name] = known or self._threads.submit(self._reader.tensor, name, pinned)

    def tensor(self, name: str) -> Tensor:
        """Tensor on the CPU in the source dtype; read now where it was not expected.

        Raises:
            InputError: As `TensorReader.tensor`, also for what failed ahead of time.
        """
        future = self._expected.pop(name, None)
        return self._reader.tensor(name) if future is None else future.result()
