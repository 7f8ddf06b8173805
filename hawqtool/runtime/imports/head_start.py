"""Head start of a run: on a GPU libraries are imported in threads of their own, and the GPU is woken meanwhile.

Of the thousands of small files behind the libraries most are read within milliseconds on a disk of one's own; on shared
disks and in sandboxes, where GPUs often are, each takes as long, and threads wait for them side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from importlib import import_module, util
from pathlib import Path

from hawqtool.runtime.background import beside
from hawqtool.runtime.imports.quick_scans import import_models, quick_distributions
from hawqtool.runtime.launched import local_rank

_DRIVER = "libcuda.so.1"
_LEADING = "transformers"
"""It puts another module into its own place, which a thread that waits for it would not see: so it is imported here."""
_FACTORS = "libtorch_cuda_linalg.so"
_TRITON, _TRITON_RUNTIME = "triton.runtime.cache", "triton.runtime"
_ALONE = ("sympy",)
_BEHIND_TORCH = ("scipy.optimize",)
"""What the libraries of models import; it looks at torch while it is imported, which must be whole then."""
_GENERATION, _ANSWER = "transformers.generation.utils", "is_sklearn_available"
"""What all models are made of, and transformers' question whether it may import scikit-learn for that."""


def head_start(device: str) -> None:
    """Import the slow libraries, and where there is a GPU to compute on in threads; a CPU has no time left over.

    What fails in a thread fails again where it is needed.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    driver = None if device == "cpu" else _driver()
    if driver is not None:
        beside(partial(_make_context, driver, local_rank()))
        beside(partial(_import_all, _ALONE))
        beside(_from_torch_on)
    with quick_distributions():
        import_module(_LEADING)
    import_models()  # which needs no torch, for which all else has to wait
    if driver is not None:
        _import_generation()


def _import_generation() -> None:
    """Import what models are made of, but for scikit-learn: 800 modules for assisted sampling, done nowhere."""
    utils = import_module(f"{_LEADING}.utils")
    known = getattr(utils, _ANSWER, None)
    if known is None:  # a version that asks in another way
        import_module(_GENERATION)
        return
    setattr(utils, _ANSWER, lambda: False)
    try:
        import_module(_GENERATION)
    finally:
        setattr(utils, _ANSWER, known)


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError:
        return None


def _make_context(driver: ctypes.CDLL, number: int) -> None:
    """Make the context of the GPU that torch will use; asked by C, the interpreter goes on meanwhile."""
    if driver.cuInit(0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), number)


def _from_torch_on() -> None:
    import_module("torch")
    beside(wake)
    _import_all(_BEHIND_TORCH)


def wake() -> None:
    """Load the libraries of products and factors, which takes a second, and wake Triton, which takes one or two."""
    import torch

    if local_rank() < torch.cuda.device_count():
        few = torch.ones((8, 8), dtype=torch.bfloat16, device=f"cuda:{local_rank()}")
        float((few @ few).sum())
        # Opened by torch itself, the first of two threads that factor a matrix may fail the other one.
        _open_library(Path(torch.__file__).parent / "lib" / _FACTORS)
        if util.find_spec(_TRITON.partition(".")[0]) is not None:
            _wake_triton()


def _open_library(path: Path) -> None:
    if path.exists():
        ctypes.CDLL(str(path))


def _wake_triton() -> None:
    """Have Triton find out what it remembers; versions that keep that elsewhere do it when a kernel is called."""
    getattr(import_module(_TRITON), "triton_key", int)()  # by which compiled kernels are named
    _ = import_module(_TRITON_RUNTIME).driver.active.utils  # asks other programs for the driver's place


def _import_all(names: Sequence[str]) -> None:
    """Import modules, but for those of libraries that are not installed."""
    for name in names:
        if util.find_spec(name.partition(".")[0]) is not None:
            import_module(name)
