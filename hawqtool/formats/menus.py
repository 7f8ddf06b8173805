"""Menus of formats by hardware: what its engines run, from few bits to all, by the source of vLLM 0.33."""

from __future__ import annotations

from hawqtool.formats import UNQUANTIZED

MENUS = {
    "ampere": ("w4g32", "w4g128", "w8ch-a8i", UNQUANTIZED),
    "hopper": ("nvfp4", "fp8-a8f", UNQUANTIZED),
    "blackwell": ("nvfp4-a4", "fp8-a8f", UNQUANTIZED),
    "cpu": ("w4g32", "w8ch-a8i", UNQUANTIZED),
    "transformers": ("nvfp4", "w4g32", "fp8", "w8ch", UNQUANTIZED),
}
"""Labels of the menu by the name of hardware, or of the engine that runs on all.

ampere: 8.0 to 8.9 multiply INT8; floats run there as weights alone. hopper: `nvfp4` on Marlin, inputs as they are, the
best 4 bits of equal size. blackwell: both factors in four bits. cpu: vLLM takes 4-bit integers and these.
"""


def menu_labels(text: str) -> tuple[str, ...]:
    """The labels of a menu that is named, else the one label that is given."""
    return MENUS.get(text, (text,))
