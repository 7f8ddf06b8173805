"""Settings of the memory allocators below torch, made before anything large is allocated."""

from __future__ import annotations

import os

from hawqtool.model.heap import prepare_heap


def prepare_allocators() -> None:
    """Set what nobody has set: growing segments on a GPU, a heap that keeps some of what was freed on a CPU."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Blocks of fixed sizes leave gaps that no large tensor fits: an 8B model ran out of 80 GB where 63 suffice.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    prepare_heap()
