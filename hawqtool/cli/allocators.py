"""Settings of the memory allocators below torch, made before anything large is allocated."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's settings (malloc.h)."""

_KEPT_BYTES, _HEAP_BYTES = 64 << 20, 8 << 20
"""Freed memory that the process keeps, and the size from which a tensor is mapped apart from the heap."""


def prepare_allocators() -> None:
    """Set what nobody has set: growing segments on a GPU, a heap that keeps some of what was freed on a CPU."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Blocks of fixed sizes leave gaps that no large tensor fits: an 8B model ran out of 80 GB where 63 suffice.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        # Else all large tensors go back to the system, and the next ones wait for new pages: some percent of a CPU's
        # run. The largest do, whose holes in the heap few others fit: 40 to 100 MB where SmolLM2 is rounded.
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if set_option is not None:
            set_option(_MMAP_THRESHOLD, _HEAP_BYTES)
            set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
