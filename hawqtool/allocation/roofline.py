"""The second cost by a roofline: what reading and multiplying a unit takes at least on a card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hawqtool.errors import UsageError
from hawqtool.formats import QuantFormat
from hawqtool.formats.hardware import HARDWARE
from hawqtool.records import Menu, Unit

_MICROSECONDS = 1e6
MAX_TOKENS = 1 << 20
"""Most tokens of a step."""


def names_hardware(costs: str | None) -> bool:
    """Whether costs are named by hardware, such as ``hopper:64``, and do not lie in a file."""
    return costs is not None and costs.partition(":")[0] in HARDWARE


class RooflineCosts:
    """Microseconds of a unit in one step of an engine, by its format.

    A step of M tokens reads the stored bytes of the unit and multiplies them by M inputs, one beside the other:
    max(bytes / bandwidth, 2 M weights / rate), the roofline of Williams, Waterman and Patterson (2009). Of routed
    experts, which a token reads by their share s, a step reads 1 - (1 - s)^M and multiplies M s. Real kernels take
    longer, some more than others: a measured file knows.

    Args:
        text: ``HARDWARE:TOKENS``, an architecture and the tokens of a step: streams at a time, or those of a prompt.

    Raises:
        UsageError: If it says no architecture or no number of tokens.
    """

    def __init__(self, text: str) -> None:
        name, _, tokens = text.partition(":")
        if name not in HARDWARE or not tokens.isascii() or not tokens.isdigit() or not 0 < int(tokens) <= MAX_TOKENS:
            raise UsageError(
                f"--costs {text} names no hardware with the tokens of a step (1 to {MAX_TOKENS}); give such as "
                f"hopper:64, of {', '.join(HARDWARE)}, or a file"
            )
        self._text, self._hardware, self._tokens = text, HARDWARE[name], int(tokens)

    def of_menu(self, units: Sequence[Unit], menu: Menu) -> dict[str, dict[Any, float]]:
        """Unit name to format to cost, for all formats of a menu.

        Raises:
            UsageError: If a format does not run on the hardware; names it.
        """
        return {unit.name: {fmt: self._cost(unit, fmt) for fmt in menu[unit.name]} for unit in units}

    def _cost(self, unit: Unit, quant_format: QuantFormat) -> float:
        rate = self._hardware.rate(quant_format.label)
        if rate is None:
            raise UsageError(
                f"--costs {self._text}: {quant_format.label} does not run there; drop it from --formats, or choose "
                f"other hardware ({', '.join(_that_run(quant_format))} has kernels for it)"
            )
        share, tokens = unit.active_share, self._tokens
        reading = unit.stored_bytes(quant_format) * (1 - (1 - share) ** tokens) / self._hardware.bandwidth
        return _MICROSECONDS * max(reading, 2 * tokens * share * unit.num_weights / rate)


def _that_run(quant_format: QuantFormat) -> list[str]:
    return [name for name, hardware in HARDWARE.items() if hardware.rate(quant_format.label) is not None]
