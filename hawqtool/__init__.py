"""hawqtool: measure, allocate, round, verify: mixed-precision quantization of transformer checkpoints.

The functions of `hawqtool.api` are here by name; importing the package loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqtool.api import Result, allocate, evaluate, measure, quantize, verify
    from hawqtool.config import RunConfig
    from hawqtool.errors import HawqError

__version__ = "0.1.0"
__all__ = ["HawqError", "Result", "RunConfig", "allocate", "evaluate", "measure", "quantize", "verify"]

_HOMES = {"RunConfig": "hawqtool.config", "HawqError": "hawqtool.errors"}


def __getattr__(name: str) -> Any:
    """A public name, whose module is loaded when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'hawqtool' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "hawqtool.api")), name)
