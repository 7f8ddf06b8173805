"""Signals that end a command, also where Python cannot raise, and in bounded time."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hawqtool.runtime.launched import world_size
from hawqtool.runtime.lifeline import watch_launcher, watch_parent

INTERRUPTED, TERMINATED = 130, 143
END_SECONDS = 30.0
"""Most seconds from a signal to the end of the process: removing what is half done takes less than one, as a rule."""

_AGAIN_SECONDS = 0.05
_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGHUP: TERMINATED}
_CUT_OFF = b"the command did not end by itself after a signal and was cut off; the same command goes on\n"


class Terminated(BaseException):
    """SIGTERM arrived, or SIGHUP: the terminal was closed."""


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


class _Deadline:
    """Ends the process if a signal that should end it has not done so in time; a context manager.

    Whatever the main thread waits for, such as a lock or a pipe that nobody reads: the system tells a thread of its
    own of the signal, which does nothing but wait. What is kept on disk is whole at every moment.
    """

    def __enter__(self) -> None:
        self._read, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._previous = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous)
        os.close(self._written)

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] in _CODES:
                time.sleep(END_SECONDS)
                if select.select([], [2], [], 0)[1]:
                    os.write(2, _CUT_OFF)
                os._exit(_CODES[signal.Signals(number[0])])
        os.close(self._read)


@contextmanager
def ending_signals() -> Iterator[None]:
    """While the context lasts, SIGTERM and SIGHUP raise `Terminated`, and neither they nor Ctrl-C are lost.

    The process ends `END_SECONDS` after the signal at the latest, also when the context has ended by then. When the
    process dies that gave it a lifeline, or that started it together with others, it gets a SIGTERM. An ignored SIGHUP
    stays ignored, as ``nohup`` wants.

    The exception of a signal goes nowhere if it is raised in a destructor or in the callback of a weak reference, as
    importing has them: Python prints it as ignored, and the work goes on. Then the signal is sent once more.
    """
    terminals = [stream for stream in (1, 2) if _is_terminal(stream)]

    def hang_up(_signal: int, _frame: FrameType | None) -> None:
        for stream in terminals:  # which would refuse what is still said
            os.dup2(nowhere, stream)
        raise Terminated

    nowhere = os.open(os.devnull, os.O_WRONLY)
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    hook = sys.unraisablehook
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
    watch_parent(_end)
    if world_size() > 1:
        watch_launcher(_end)
    try:
        with _Deadline():
            yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = hook
        for ending, handler in previous.items():
            signal.signal(ending, handler)
        os.close(nowhere)


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _is_terminal(stream: int) -> bool:
    try:
        return os.isatty(stream)
    except OSError:  # closed
        return False
