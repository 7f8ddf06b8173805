"""Divergence of whole plans whose layers are rounded one by one: what tells plans apart before one is carried out.

Every layer is rounded on the original model's inputs, in all formats that some plan gives it, behind one factor. So a
walk over the calibration rows serves all plans, and the codes of a block are forgotten with the block. Corrections that
look at what earlier blocks became (target shift, GPTAQ), output feedback and learning are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.model.block import LoadedBlock
from hawqtool.records import BlockSpec, LinearSpec, Rows, UnitFormats
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.spec import InputGroup, InputGroups, RoundingSpec
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.dealt import dealt
from hawqtool.streaming.input_statistics import group_statistics
from hawqtool.streaming.kept_roundings import KeptRoundings, Roundings
from hawqtool.streaming.stream import ModelStream


class Calibration(NamedTuple):
    """What is behind the roundings.

    Args:
        rows: Calibration rows.
        batch_size: Rows per pass, of those that are judged too.
        kept: Roundings that were made before, which serve as well; the others are made on the rows.
    """

    rows: Rows
    batch_size: int
    kept: KeptRoundings | None = None


def plan_divergences(
    comparison: OutputComparison,
    calibration: Calibration,
    rounding: RoundingSpec,
    plans: Mapping[str, UnitFormats],
    progress: Callable[[int, int], None],
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Divergence of every row by plan, ``[rows]`` float64, each layer rounded by itself.

    One block is in memory at a time, with its codes in all formats that are wanted.

    Args:
        comparison: The original, rows to judge on (this rank's), and a stream of the weights that are rounded.
        calibration: What is behind the roundings.
        rounding: Method, and formats of every unit: those of all plans.
        plans: Formats by unit, by name of the plan.
        progress: Called with blocks done and blocks in all.
        ranks: Processes that share both sets of rows; each has the result of all.

    Raises:
        NumericalError: If a plan's outputs are not finite.
    """
    rounding = replace(rounding, method=replace(rounding.method, passes=1))  # more make all errors smaller alike
    rows, batch_size, kept = calibration
    stream, share = comparison.candidate, ranks.share(len(rows.tokens))
    blocks, own = stream.structure.blocks, rows.tokens[share]
    held_out = rounding.method.needs_held_out
    own_missing = [spec.index for spec in blocks if kept is None or not kept.covers(spec, plans)]
    missing = set[int]().union(*ranks.everywhere(own_missing))  # a block is rounded by all together or by none
    last = len(blocks) if stream.head else max(missing, default=-1)
    with stream.keeping_pages(), torch.no_grad():
        known = stream.embed(own, batch_size, held_out, importance=rows.importance)
        known.ranks, known.first_row = ranks, share.start
        first = stream.embed(comparison.rows, batch_size)
        states = {name: Activations(copy(first.hidden), first.calls) for name in plans}
        for spec in blocks:
            onward = spec.index < last  # no state is wanted behind the last block that is rounded here
            replaced = () if onward or spec.index in missing else _replaced(spec, plans)
            with stream.block(spec.index, () if replaced else None, replaced) as block:
                if kept is None or spec.index in missing:
                    found = _rounded(block, _statistics(block, known, rounding, onward), rounding, ranks)
                else:
                    found = kept.take(spec.index)
                    if onward:
                        advance(block, known)
                for name, formats in plans.items():
                    with block.with_weights(_weights(block, found, formats)):
                        advance(block, states[name])
                del found
            progress(spec.index + 1, len(blocks))
        head = _head(stream, own, known, rounding, ranks)
        finals = {name: torch.cat(list(seen.hidden)) for name, seen in states.items()}
        del states, first, known
        divergences = comparison.divergences(finals, lambda name: head(plans[name]))
    shares = ranks.everywhere(divergences)
    return {name: _finite(name, torch.cat([part[name] for part in shares])) for name in plans}


def _statistics(block: LoadedBlock, known: Activations, rounding: RoundingSpec, onward: bool) -> InputGroups:
    """Statistics of the input groups that some plan rounds; the hidden states are handed on where they are needed."""
    groups = [group for group in block.spec.input_groups if any(map(rounding.formats_of, group))]
    if groups:
        return group_statistics(block, known, groups, whole=onward)
    if onward:
        advance(block, known)
    return ()


def _rounded(block: LoadedBlock, groups: InputGroups, rounding: RoundingSpec, ranks: Ranks) -> Roundings:
    def compute(part: Sequence[InputGroup]) -> list[Roundings]:
        return [
            {name: {label: one.rounded for label, one in by_label.items()} for name, by_label in found.items()}
            for found in rounding.roundings_of(block, part)
        ]

    dealt_out = dealt(ranks, groups, compute, rounding.parts)
    return {name: values for _, found in dealt_out for name, values in found.items()}


def _replaced(spec: BlockSpec, plans: Mapping[str, UnitFormats]) -> Sequence[str]:
    """Weights of a block, by their names inside it, in whose place every plan has rounded ones."""

    def is_rounded(unit: str) -> bool:
        return all(unit in formats and not formats[unit].is_unquantized for formats in plans.values())

    names = (linear.module_name.removeprefix(f"{spec.name}.") for linear in spec.linears if is_rounded(linear.unit))
    return [f"{name}.weight" for name in names]


def _weights(block: LoadedBlock, found: Roundings, formats: UnitFormats) -> dict[str, Tensor]:
    """Rounded weights of a block under a plan, in the dtype that it computes in."""
    return {
        linear.name: dequantize(*found[linear.name][formats[linear.unit].label]).to(block.parameter(linear).dtype)
        for linear in block.spec.linears
        if linear.name in found and not formats[linear.unit].is_unquantized
    }


def _head(
    stream: ModelStream, rows: Tensor, known: Activations, rounding: RoundingSpec, ranks: Ranks
) -> Callable[[UnitFormats], AbstractContextManager[None]]:
    """Gives the context in which the output head is that of a plan; it stays as it is where none rounds it."""
    head = stream.head
    if head is None or not any(map(rounding.formats_of, head.spec.linears)):
        return lambda _: nullcontext()
    groups: Iterator[tuple[Sequence[LinearSpec], GroupStatistics]] = (
        (group, stream.head_statistics(rows, known)) for group in head.spec.input_groups
    )
    found = _rounded(head, groups, rounding, ranks)
    return lambda formats: head.with_weights(_weights(head, found, formats))


def _finite(name: str, rows: Tensor) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise NumericalError(f"plan {name}: the model gives outputs that are NaN or Inf")
    return rows
