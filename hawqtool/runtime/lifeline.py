"""Lifeline between processes: a pipe that closes when the parent dies, however it dies, so that children end with it.

Signals cannot do that: nothing runs in a process that is killed, and its children go on without it.
"""

from __future__ import annotations

import os
import select
import stat
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

VARIABLE = "HAWQTOOL_LIFELINE"
"""Environment variable by which a child finds its end: number, device and inode of the pipe."""


class Lifeline:
    """The parent's end; a context manager. Children of the same parent may share it.

    Attributes:
        descriptor: The children's end, to be passed on to them.
    """

    def __enter__(self) -> Self:
        self.descriptor, self._held = os.pipe()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._held)
        os.close(self.descriptor)

    @property
    def environment(self) -> dict[str, str]:
        """What a child's environment must have."""
        status = os.fstat(self.descriptor)
        return {VARIABLE: f"{self.descriptor}:{status.st_dev}:{status.st_ino}"}


def watch_parent(ended: Callable[[], object]) -> None:
    """Call something when the parent has died; nothing where it has no lifeline for this process.

    Args:
        ended: Called in a thread of its own, at most once.
    """
    descriptor = _inherited(os.environ.pop(VARIABLE, ""))
    if descriptor is not None:
        threading.Thread(target=_wait, args=(descriptor, ended), name="lifeline", daemon=True).start()


def watch_launcher(ended: Callable[[], object]) -> None:
    """Call something when the process that started this one has ended, whatever it is; nothing where no system tells.

    A launcher of several processes, such as torch's, passes no lifeline on.

    Args:
        ended: Called in a thread of its own, at most once.
    """
    if not hasattr(os, "pidfd_open"):  # Linux has it
        return
    try:
        descriptor = os.pidfd_open(os.getppid())
    except OSError:
        return
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)

    def wait() -> None:
        waiting.poll()
        ended()

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _inherited(text: str) -> int | None:
    """The descriptor, if it is the parent's pipe: programs in between may have closed it and opened another file."""
    try:
        descriptor, device, inode = map(int, text.split(":"))
        status = os.fstat(descriptor)
    except (ValueError, OverflowError, OSError):
        return None
    same = (status.st_dev, status.st_ino) == (device, inode)
    return descriptor if same and stat.S_ISFIFO(status.st_mode) else None


def _wait(descriptor: int, ended: Callable[[], object]) -> None:
    os.read(descriptor, 1)  # nobody writes: it returns when all other ends are closed
    ended()
