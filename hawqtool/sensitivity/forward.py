"""The forward sweep of a measurement: what the reverse sweep will need of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from copy import copy
from dataclasses import dataclass

from torch import Tensor

from hawqtool.model.block import LoadedBlock
from hawqtool.records import BlockSpec, LinearSpec, Menu
from hawqtool.rounding.gram import pack_panels, unpack_panels
from hawqtool.rounding.spec import InputGroups
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.input_statistics import equally_important, group_statistics
from hawqtool.streaming.offload import Offload, total_bytes
from hawqtool.streaming.stream import ModelStream

Progress = Callable[[str, int, int], None]
_GRAM_SHARE = 2
"""Gram matrices of a block are kept where they take at most this many times its hidden states on the same rows."""


@dataclass(frozen=True)
class Stored:
    """What the forward sweep leaves for the reverse one, about one block.

    Args:
        grams: Input groups, each with what gives its statistics on the calibration rows; empty where these are to be
            found again.
        calibration: Hidden states before the block, for that; else empty, unless they were asked for.
        scoring: Hidden states before the block.
    """

    grams: list[tuple[Sequence[LinearSpec], Callable[[], GroupStatistics]]]
    calibration: MutableSequence[Tensor]
    scoring: MutableSequence[Tensor]

    def statistics(self) -> InputGroups:
        """Groups with their statistics, one in memory at a time; an empty list where none were kept."""
        return _each(self.grams) if self.grams else []


def _each(
    grams: Sequence[tuple[Sequence[LinearSpec], Callable[[], GroupStatistics]]],
) -> Iterator[tuple[Sequence[LinearSpec], GroupStatistics]]:
    for group, load in grams:
        yield group, load()


def forward_sweep(
    stream: ModelStream,
    calibration: Activations,
    scoring: Activations,
    left: int,
    menu: Menu,
    progress: Progress,
    keeps_states: bool = False,
) -> list[Stored]:
    """What the reverse sweep needs of the first ``left`` blocks, where it is still to come.

    Both sets of rows end after the last block where that is one of them: its output begins the reverse sweep. With
    ``keeps_states`` the calibration rows' states before each block are kept in any case.
    """
    stored = []
    count = len(stream.structure.blocks)
    for spec in stream.structure.blocks[:left]:
        before, known = copy(scoring.hidden), copy(calibration.hidden) if keeps_states else []
        groups = _wanted_groups(spec, menu)
        goes_on = spec.index < left - 1 or left == count
        # Only the head needs what the last block gives on the calibration rows.
        onward = goes_on and (spec.index < count - 1 or stream.structure.head is not None)
        with stream.block(spec.index) as block:
            if _keeps_statistics(groups, calibration):
                collected = group_statistics(block, calibration, groups, whole=onward)
                grams = [(group, _put_away(statistics, stream.offload)) for group, statistics in collected]
                stored.append(Stored(grams, known, before))
            else:
                stored.append(Stored([], copy(calibration.hidden), before))
                if onward:
                    advance(block, calibration)
            if goes_on:
                advance(block, scoring)
        progress("forward sweep", spec.index + 1, left)
    return stored


def wanted_statistics(block: LoadedBlock, calibration: Activations, menu: Menu) -> InputGroups:
    """Statistics of the groups in which a unit has formats to score."""
    groups = _wanted_groups(block.spec, menu)
    return group_statistics(block, calibration, groups) if groups else ()


def _wanted_groups(spec: BlockSpec, menu: Menu) -> list[Sequence[LinearSpec]]:
    return [group for group in spec.input_groups if any(menu.get(linear.unit) for linear in group)]


def _keeps_statistics(groups: Sequence[Sequence[LinearSpec]], calibration: Activations) -> bool:
    """Whether Gram matrices take so little beside the hidden states that they need not be found twice.

    They are the same both times, so this decides on time and memory alone.
    """
    matrices = [
        parts[0][0].in_features ** 2 * len(parts)
        for parts in (equally_important(g, calibration.importance) for g in groups)
    ]
    gram_bytes = 4 * sum(matrices) * (2 if calibration.held_out else 1)
    return 0 < gram_bytes <= _GRAM_SHARE * total_bytes(calibration.hidden)


def _put_away(statistics: GroupStatistics, offload: Offload | None) -> Callable[[], GroupStatistics]:
    """Keep statistics of the original model, which have no drift, with the hidden states; the result gives them back.

    The matrices of all blocks may take twice as much as the hidden states do; of each a triangle is kept.
    """
    if offload is None:
        return lambda: statistics
    packed, size = offload.store(pack_panels(statistics.gram)), len(statistics.gram)
    counts = statistics.num_tokens, statistics.num_routed
    held_out = None if statistics.held_out is None else _put_away(statistics.held_out, offload)
    weighted = statistics.weighted
    return lambda: GroupStatistics(
        unpack_panels(packed.load(), size),
        *counts,
        held_out=None if held_out is None else held_out(),
        weighted=weighted,
    )
