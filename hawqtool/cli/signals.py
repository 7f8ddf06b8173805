"""Signals that end a command, also where Python cannot raise."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_SECONDS = 0.05


class Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def ending_signals() -> Iterator[None]:
    """While the context lasts, SIGTERM raises `Terminated`, and neither it nor Ctrl-C is lost.

    The exception of a signal goes nowhere if it is raised in a destructor or in the callback of a weak reference, as
    importing has them: Python prints it as ignored, and the work goes on. Then the signal is sent once more.
    """
    previous, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    timers: list[threading.Timer] = []

    def send_again(lost: Any) -> None:
        if isinstance(lost.exc_value, Terminated | KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT
            # Not at once: the handler would run in this function, which cannot raise either.
            timers.append(threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)))
            timers[-1].daemon = True
            timers[-1].start()
        else:
            hook(lost)

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, previous)
