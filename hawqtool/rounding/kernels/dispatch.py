"""Which code runs the column loop and the scale search: Triton's on a GPU, Numba's on a CPU, else torch's operations.

``HAWQTOOL_KERNEL=eager``, ``numba`` or ``triton`` overrides the choice, to compare them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch

from hawqtool.errors import UsageError

EAGER = "eager"
KERNELS = (EAGER, "numba", "triton")
VARIABLE = "HAWQTOOL_KERNEL"
_BY_DEVICE = {"cpu": "numba", "cuda": "triton"}
_COLUMN_LOOPS = {"numba": "numba_cpu", "triton": "triton_columns"}
_SEARCHES = {"numba": "numba_cpu", "triton": "triton_scales"}


def kernel_for(device: torch.device) -> str:
    """What the device's kernels are written in, where that is installed, else ``eager``.

    Raises:
        UsageError: If the environment variable names no kernel, or one that the device does not run.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in KERNELS:
            raise UsageError(f"{VARIABLE}={forced}: must be one of {', '.join(KERNELS)}")
        if forced == "numba" and device.type != "cpu":
            raise UsageError(f"{VARIABLE}=numba: runs on a CPU only, found --device {device.type}; unset it")
        if forced != EAGER and not importlib.util.find_spec(forced):
            raise UsageError(f"{VARIABLE}={forced}: {forced} is not installed; unset it")
        return forced
    kernel = _BY_DEVICE.get(device.type, EAGER)
    return kernel if importlib.util.find_spec(kernel) else EAGER


def kernel_version(device: torch.device) -> str:
    """The device's kernel with the version of what compiles it, on which the last bits of results may depend.

    Raises:
        UsageError: As `kernel_for`.
    """
    kernel = kernel_for(device)
    compiler = "torch" if kernel == EAGER else kernel
    return f"{kernel}, {compiler} {importlib.import_module(compiler).__version__}"


def column_loop(device: torch.device, floats: bool = False) -> ModuleType | None:
    """The module whose ``round_block`` rounds ``BLOCK_COLUMNS`` columns; None for the eager loop.

    Args:
        device: Where the columns are.
        floats: Whether codes are floats, which Numba's does not know.
    """
    kernel = kernel_for(device)
    return None if floats and kernel == "numba" else _imported(_COLUMN_LOOPS.get(kernel))


def compile_ahead(
    device: torch.device, has_zeros: bool, widths: Iterable[int], searches: Sequence[tuple[int, int]]
) -> None:
    """Compile what a GPU needs for the column loop and the scale search; nothing for kernels that are not Triton's.

    Args:
        device: Where the weights will be.
        has_zeros: Whether grids have zero points.
        widths: Columns of a group.
        searches: Numbers of candidates and of zero points that are tried together.
    """
    if kernel_for(device) == "triton":
        scales, columns = (_module(names["triton"]) for names in (_SEARCHES, _COLUMN_LOOPS))
        scales.compile_ahead(device, widths, searches)
        columns.compile_ahead(device, has_zeros)


def table_loop(device: torch.device) -> ModuleType | None:
    """The module whose ``round_block`` rounds columns to a table of values; None for the eager loop."""
    return _imported("triton_tables") if kernel_for(device) == "triton" else None


def scale_search(device: torch.device) -> ModuleType | None:
    """The module whose ``least_errors`` tries scales; None for the eager search."""
    return _imported(_SEARCHES.get(kernel_for(device)))


def _imported(name: str | None) -> ModuleType | None:
    """Imported at first use: compilers are absent on many machines, and slow to import."""
    return None if name is None else _module(name)


def _module(name: str) -> ModuleType:
    """A module of compiled code."""
    return importlib.import_module(f"hawqtool.rounding.kernels.{name}")
