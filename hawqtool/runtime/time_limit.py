"""Time limit for code that is not ours: chat templates, patterns of a foreign config."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitError(Exception):
    """The time limit of the work was passed."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Bound the wall clock time of a block of Python code or regex matching.

    Works by SIGALRM, which Python delivers to the main thread alone: in other threads nothing is bounded. Limits do
    not nest.

    Args:
        seconds: Most seconds the block may take.

    Raises:
        TimeLimitError: If it takes longer; raised inside the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeLimitError(f"no end after {seconds:g} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
