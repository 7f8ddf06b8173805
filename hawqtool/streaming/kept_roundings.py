"""Roundings that measuring makes, kept on a GPU for the comparison of plans, which needs some of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hawqtool.records import BlockSpec, UnitFormats
from hawqtool.rounding.grid import Quantized
from hawqtool.streaming.offload import Offload

Roundings = dict[str, dict[str, Quantized]]
"""Codes, scales and zero points by linear and format label."""

ROUNDINGS = "roundings"
"""Name under which ranks that do not lead have them."""


class KeptRoundings:
    """Codes and scales by block, as far as the device has room.

    What is not here is rounded once more on the same rows, so that neither room nor a resumed run changes the result.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Roundings, object]] = {}

    def keep(self, index: int, codes: Roundings, offload: Offload | None) -> None:
        """Keep the roundings of a block where the device has room beside its work.

        Args:
            index: The block's number.
            codes: Its roundings.
            offload: What says how much room there is; None for a device that has any.
        """
        size = sum(_bytes(one) for by_label in codes.values() for one in by_label.values())
        room = object() if offload is None else offload.reserve(size)
        if room is not None:
            self._blocks[index] = codes, room

    def covers(self, spec: BlockSpec, plans: Mapping[str, UnitFormats]) -> bool:
        """Whether all roundings of a block are kept that some plan wants; plans are formats by unit."""
        if spec.index not in self._blocks:
            return False
        known, _ = self._blocks[spec.index]
        return all(
            formats[linear.unit].label in known.get(linear.name, {})
            for formats in plans.values()
            for linear in spec.linears
            if linear.unit in formats
        )

    def take(self, index: int) -> Roundings:
        """Let go of a block's roundings, which are kept."""
        return self._blocks.pop(index)[0]

    def drop(self) -> None:
        """Let go of all."""
        self._blocks.clear()


def _bytes(rounded: Quantized) -> int:
    return sum(part.nbytes for part in rounded if isinstance(part, Tensor))
