"""Which kernels run: Triton's on a GPU, eager torch elsewhere.

``HAWQTOOL_KERNEL=eager`` or ``triton`` overrides the choice, to compare the two.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from hawqtool.errors import UsageError

KERNELS = ("eager", "triton")
VARIABLE = "HAWQTOOL_KERNEL"


def kernel_for(device: torch.device) -> str:
    """``triton`` on a GPU where Triton is installed, else ``eager``.

    Raises:
        UsageError: If the environment variable names no kernel.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in KERNELS:
            raise UsageError(f"{VARIABLE}={forced}: must be one of {', '.join(KERNELS)}")
        return forced
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "eager"


def triton_kernels(name: str) -> ModuleType:
    """A module of Triton kernels, imported at first use: Triton is absent on many machines, and slow to import."""
    return importlib.import_module(f"hawqtool.rounding.{name}")
