"""Work beside the main thread, in one thread of its own: writing what may be needed later, arithmetic on a side stream.

A GPU that factors small matrices is idle for the most part, and so is a process that waits for the disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # work may begin beside the import of torch
    import torch

T = TypeVar("T")


def beside(work: Callable[[], T]) -> Callable[[], T]:
    """Begin a piece of work in a thread of its own, for which a process that ends does not wait.

    Returns:
        What waits for the result and gives it, or raises what the work raised.
    """
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again in the thread that waits for it
            future.set_exception(error)

    threading.Thread(target=do, name="beside", daemon=True).start()
    return future.result


class BegunWork:
    """Work that was begun before its result is asked for, by key; each result is given once."""

    def __init__(self) -> None:
        self._begun: dict[Hashable, Callable[[], Any]] = {}

    def begin(self, key: Hashable, work: Callable[[], object]) -> None:
        """Begin a piece of work in a thread of its own, once."""
        if key not in self._begun:
            self._begun[key] = beside(work)

    def result(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of what was begun, once; else that of the work, which is done now.

        Raises:
            Exception: What the work raised.
        """
        found: T = self._begun.pop(key, work)()
        return found


class Background:
    """Does pieces of work one after another; they are over when `finish` returns.

    Args:
        device: Where the pieces compute: on a GPU on a stream of their own, each behind what was queued before it.
        most_waiting: Pieces that wait at a time; starting another one waits for the first of them.
    """

    def __init__(self, device: torch.device | None = None, most_waiting: int = 8) -> None:
        self._stream = _side_stream(device) if device is not None and device.type == "cuda" else None
        self._most = most_waiting
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def start(self, work: Callable[[], None]) -> None:
        """Have a piece of work done; what it computes from must not change any more.

        Raises:
            Exception: What an earlier piece raised.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "background")
        ready = None if self._stream is None else _event(self._stream)
        self._waiting.append(self._thread.submit(self._do, work, ready))
        while len(self._waiting) > self._most or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def _do(self, work: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        import torch

        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            work()
            self._stream.synchronize()  # what the work has read may be freed for others now

    def finish(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: What the first of the pieces that failed raised.
        """
        while self._waiting:
            self._waiting.popleft().result()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(device)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """What is queued until now on the current stream of another stream's device."""
    import torch

    return torch.cuda.current_stream(stream.device).record_event()
