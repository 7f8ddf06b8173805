"""Reading the next block's weights while the current one is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
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
        device: A GPU to which that is copied beside its other work; None leaves it where it is.
    """

    def __init__(self, reader: Reader, pinned: bool = False, device: torch.device | None = None) -> None:
        self._reader, self._pinned, self._device = reader, pinned, device
        self._copies = None if device is None else torch.cuda.Stream(device)
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
            self._expected[name] = known or self._threads.submit(self._read, name, pinned)

    def _read(self, name: str, pinned: bool) -> Tensor:
        """A tensor that is expected, on the device where there is one."""
        found = self._reader.tensor(name, pinned)
        if self._copies is None or not pinned or found.is_cuda:
            return found
        with torch.cuda.stream(self._copies):
            copy = found.to(self._device, non_blocking=True)
        self._copies.synchronize()
        return copy

    def tensor(self, name: str) -> Tensor:
        """Tensor in the source dtype, on the CPU or the device; read now where it was not expected.

        Raises:
            InputError: As `TensorReader.tensor`, also for what failed ahead of time.
        """
        future = self._expected.pop(name, None)
        if future is None:
            return self._reader.tensor(name)
        found = future.result()
        if self._copies is not None and found.is_cuda:
            # Its memory is of the other stream, which must not have it again before this one is done with it.
            found.record_stream(torch.cuda.current_stream(self._device))
        return found
