"""What the C library's heap keeps although nothing uses it."""

from __future__ import annotations

import ctypes
import sys

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""glibc's; other C libraries have none."""


def release_freed_pages() -> None:
    """Give the system back the pages of the heap that hold nothing.

    Freed tensors leave holes that those of the next stage do not fit. New pages take time: done once a block, it made
    weighing on a CPU a third slower.
    """
    if _trim is not None:
        _trim(0)
