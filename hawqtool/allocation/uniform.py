"""Uniform plans, the yardstick of every mixed plan: one width and one group size for all units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hawqtool.errors import UsageError
from hawqtool.formats import (
    CHANNEL,
    GROUP_SIZES,
    MAX_BITS,
    MIN_BITS,
    QuantFormat,
    fitting_group_size,
    group_sizes_tried,
)
from hawqtool.records import Unit, UnitFormats

_NAMED_LAYERS = 5


class UniformPlan(NamedTuple):
    """A uniform plan.

    Args:
        label: Format label of the requested width and group size; single units may have fallen to smaller groups.
        formats: Unit name to format.
        stored_bytes: Stored bytes of all units.
    """

    label: str
    formats: UnitFormats
    stored_bytes: int

    @property
    def bits(self) -> int:
        """The common width."""
        return next(iter(self.formats.values())).bits


def unit_group_size(unit: Unit, requested: int) -> int | None:
    """The requested group size or the largest smaller one that divides every member; None if none does."""
    return fitting_group_size(requested, *(member.in_features for member in unit.members))


def uniform_formats(units: Sequence[Unit], bits: int, group_size: int, symmetric: bool = True) -> UnitFormats:
    """Formats of a uniform plan, groups falling where the requested size does not divide a layer.

    Args:
        units: Units that are quantized.
        bits: Width of every unit.
        group_size: Requested group size; ``CHANNEL`` (0) for one scale per row.
        symmetric: Whether grids have no zero points.

    Returns:
        Unit name to format.

    Raises:
        UsageError: If no supported group size divides some layers; names them.
    """
    formats: dict[str, QuantFormat] = {}
    refused: list[str] = []
    for unit in units:
        size = unit_group_size(unit, group_size)
        if size is None:
            alone = [m for m in unit.members if fitting_group_size(group_size, m.in_features) is None]
            # Members that only together fit none are all to blame.
            refused += [f"{member.name} ({member.in_features} inputs)" for member in alone or unit.members]
        else:
            formats[unit.name] = QuantFormat(bits, size, symmetric)
    if refused:
        named = ", ".join(refused[:_NAMED_LAYERS])
        more = f" and {len(refused) - _NAMED_LAYERS} more" if len(refused) > _NAMED_LAYERS else ""
        tried = ", ".join(map(str, group_sizes_tried(group_size)))
        raise UsageError(
            f"group size {group_size}: no supported size up to it ({tried}) divides {named}{more}; "
            "use --group-size channel, or --ignore these layers"
        )
    return formats


def uniform_plans(units: Sequence[Unit], symmetric: bool = True, group_sizes: Iterable[int] = ()) -> list[UniformPlan]:
    """Every distinct uniform plan of one kind: widths 2 to 8, group sizes 128, 64, 32 and channel.

    Group sizes that do not fit all layers are left out; of plans made equal by falls one is kept, under the
    group size that its layers really have.

    Args:
        units: Units that are quantized.
        symmetric: Whether grids have no zero points.
        group_sizes: Further ones, such as those that a mixed plan may have.

    Returns:
        Plans by rising bytes, then rising bits.
    """
    candidates: list[UniformPlan] = []
    seen: set[tuple[QuantFormat, ...]] = set()
    for bits in range(MIN_BITS, MAX_BITS + 1):
        # Rising sizes: a plan all of whose layers fell to 64 is met first under its true name.
        for group_size in sorted({CHANNEL, *GROUP_SIZES, *group_sizes}):
            if not units or any(unit_group_size(unit, group_size) is None for unit in units):
                continue
            formats = uniform_formats(units, bits, group_size, symmetric)
            key = tuple(formats.values())
            if key in seen:
                continue
            seen.add(key)
            stored = sum(unit.stored_bytes(formats[unit.name]) for unit in units)
            candidates.append(UniformPlan(QuantFormat(bits, group_size, symmetric).label, formats, stored))
    return sorted(candidates, key=lambda c: (c.stored_bytes, c.bits))


def best_uniform(
    units: Sequence[Unit], budget_bytes: int, symmetric: bool = True, group_sizes: Iterable[int] = ()
) -> UniformPlan | None:
    """The uniform plan with the most stored bytes within a budget, ties to more bits; None if none fits."""
    return neighbours(units, budget_bytes, symmetric, group_sizes)[0]


def neighbours(
    units: Sequence[Unit], stored_bytes: int, symmetric: bool = True, group_sizes: Iterable[int] = ()
) -> tuple[UniformPlan | None, UniformPlan | None]:
    """The uniform plans of one kind just below (or at) and just above so many bytes, ties to more bits."""
    candidates = uniform_plans(units, symmetric, group_sizes)
    below = [c for c in candidates if c.stored_bytes <= stored_bytes]
    above = [c for c in candidates if c.stored_bytes > stored_bytes]
    return (
        max(below, key=lambda c: (c.stored_bytes, c.bits), default=None),
        min(above, key=lambda c: (c.stored_bytes, -c.bits), default=None),
    )
