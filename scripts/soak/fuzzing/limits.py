"""Limits around one input: time, memory, and which files may be touched."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_EXECUTES = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")


class LimitExceededError(Exception):
    """A parser did what no input may make it do."""


class FileGuard:
    """Watches, from an audit hook, every file that Python opens: one cannot be removed, so one is made per process.

    Args:
        folder: Where files may be written; nothing else of the disk may be read, but for what Python itself imports.
    """

    def __init__(self, folder: Path) -> None:
        self.active = False
        self._folder = os.path.realpath(folder)
        code = {*sys.path, sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[3])}
        self._code = tuple(os.path.realpath(place) for place in code if place)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _EXECUTES:
            raise LimitExceededError(f"{event} was called with {arguments[:1]}")
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITING) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
            self._look(path, writes)
        elif event in _CHANGES:
            for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]:
                self._look(path, True)

    def _look(self, path: object, writes: bool) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a file that is open already
        try:
            place = os.path.realpath(os.fsdecode(path))
        except ValueError:  # a null byte, which no file has
            return
        if _below(place, self._folder):
            return
        if writes or not any(_below(place, code) for code in self._code):
            raise LimitExceededError(f"{place} was opened for {'writing' if writes else 'reading'}")


@contextmanager
def watched(guard: FileGuard, seconds: float) -> Iterator[None]:
    """Guard the files, and stop what takes longer than some seconds.

    Raises:
        LimitExceededError: When the time is over, or another file was touched.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise LimitExceededError(f"one input took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop) if seconds else None
    if seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    guard.active = True
    try:
        yield
    finally:
        guard.active = False
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def bound_memory(more_bytes: int) -> None:
    """Let this process map no more than so many bytes beyond what it has now; beyond that comes MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _below(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)
