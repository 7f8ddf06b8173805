"""Memory of a CPU beside the C library's heap, and what that heap keeps although nothing uses it.

Freed tensors leave holes of many sizes in the heap. Where some stay for long among many that do not, it grows to twice
what it holds.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""glibc's; other C libraries have none."""


def release_freed_pages() -> None:
    """Give the system back the pages of the heap that hold nothing; new ones take some time, so not too often."""
    if _trim is not None:
        _trim(0)


def outside_heap(tensor: Tensor) -> Tensor:
    """A copy in pages of its own, which go back to the system with it; a tensor of a GPU as it is."""
    if tensor.device.type != "cpu" or not tensor.nbytes:
        return tensor
    pages = torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=tensor.dtype)
    return pages.view(tensor.shape).copy_(tensor)
