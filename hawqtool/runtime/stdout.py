"""Keeps stdout clean of what compiled libraries print there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT = 1


@contextmanager
def stdout_discarded() -> Iterator[None]:
    """Send what C code writes to the process's stdout nowhere.

    HiGHS has prints that none of its options turns off (it repairs a rounded solution, and says so); they would end
    up in the JSON on stdout. They wait in C's buffer, which must be emptied before the descriptor is put back.
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept = os.dup(_STDOUT)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, _STDOUT)
        os.close(kept)
