"""What the C library's heap keeps although nothing uses it.

A tensor that is large enough is mapped apart from the heap and goes back to the system when it is freed, and so does
the upper end of the heap. The next tensor waits for new pages then, which takes longer than many an operation on it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Numbers of glibc's settings (malloc.h)."""

_KEPT_BYTES, _HEAP_BYTES = 64 << 20, 8 << 20
"""Freed memory that the process keeps, and the size from which a tensor is mapped apart from the heap."""

_MAPPED, _EVERYTHING = 1 << 16, (1 << 31) - 1
"""Tensors that may be mapped at a time, glibc's default; a threshold that nothing reaches."""

_kept: list[None] = []
"""One entry for each context that keeps pages."""

_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_trim, _set = (getattr(_LIBRARY, name, None) for name in ("malloc_trim", "mallopt"))
"""glibc's; other C libraries have none."""


def release_freed_pages() -> None:
    """Give the system back the pages of the heap that hold nothing, unless they are kept.

    Freed tensors leave holes that those of the next stage do not fit. New pages take time: done once a block, it made
    token importance on a CPU a third slower.
    """
    if _trim is not None and not _kept:
        _trim(0)


def configure_malloc() -> None:
    """Have the heap keep some of what was freed, where nobody has set anything.

    By default almost all large tensors go back: some percent of a CPU's run. The largest do here, whose holes in the
    heap few others fit: 40 to 100 MB where SmolLM2 is rounded.
    """
    _apply({_MMAP_MAX: _MAPPED, _MMAP_THRESHOLD: _HEAP_BYTES, _TRIM_THRESHOLD: _KEPT_BYTES})


@contextmanager
def kept_pages() -> Iterator[None]:
    """While the context lasts, the heap keeps all that is freed; afterwards it is as `configure_malloc` leaves it.

    For sweeps that make the same large tensors batch after batch: new pages took a sixth of a measurement's time.
    """
    _apply({_MMAP_MAX: 0, _TRIM_THRESHOLD: _EVERYTHING})
    _kept.append(None)
    try:
        yield
    finally:
        _kept.pop()
        configure_malloc()
        release_freed_pages()


def _apply(settings: dict[int, int]) -> None:
    if _set is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        for number, value in settings.items():
            _set(number, value)


def configure_allocators() -> None:
    """Set what nobody has set: growing segments on a GPU, a heap that keeps some of what was freed on a CPU."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Blocks of fixed sizes leave gaps that no large tensor fits: an 8B model ran out of 80 GB where 63 suffice.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    configure_malloc()
