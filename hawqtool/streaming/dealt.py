"""Work on input groups that do not depend on each other, dealt to the ranks of a run by its cost, or by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import iadd
from typing import TypeVar

import torch

from hawqtool.records import LinearSpec, RoundedLayer
from hawqtool.rounding.gram import quadratic_form
from hawqtool.rounding.method import Task, TaskGroup
from hawqtool.rounding.spec import InputGroup, InputGroups
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.runtime.ranks import Ranks, owners_by_cost

Result = TypeVar("Result")


def dealt(
    ranks: Ranks,
    groups: InputGroups,
    compute: Callable[[Sequence[InputGroup]], Sequence[Result]],
    parts: Callable[[InputGroups], Iterable[Sequence[InputGroup]]],
    by_rows: Callable[[Sequence[LinearSpec]], Callable[[InputGroup], Result] | None] = lambda _: None,
) -> Iterator[tuple[Sequence[LinearSpec], Result]]:
    """Each group with what ``compute`` makes of its statistics on all rows; one rank does it, all have the result.

    Where there are fewer groups than ranks, all of them do each group together, if they can. Statistics are summed in
    the order of the ranks. One process alone has those of one part in memory at a time.

    Args:
        ranks: The processes, each with the same groups.
        groups: Input groups that do not depend on each other's results.
        compute: From a part to the result of each of its groups. It may fall to any rank, so it must not depend on
            anything that only one has.
        parts: Groups that are computed together, some at a time; their order may change.
        by_rows: Gives what computes a group on all ranks together, called by each with the same statistics; None where
            that cannot be.
    """
    if ranks.size == 1:
        for part in parts(groups):
            for (group, _), result in zip(part, compute(part), strict=True):
                yield group, result
        return
    listed = list(groups)
    together = [shared for group, _ in listed if (shared := by_rows(group)) is not None]
    if len(listed) < ranks.size and len(together) == len(listed):
        for shared in together:
            group, statistics = listed.pop(0)
            total = ranks.from_owner(ranks.folded(statistics, 0, _more), 0)
            del statistics  # the sum is what counts now
            yield group, shared((group, total))
    else:
        yield from _dealt_out(ranks, listed, compute, parts)


def _dealt_out(
    ranks: Ranks,
    listed: list[InputGroup],
    compute: Callable[[Sequence[InputGroup]], Sequence[Result]],
    parts: Callable[[InputGroups], Iterable[Sequence[InputGroup]]],
) -> Iterator[tuple[Sequence[LinearSpec], Result]]:
    """Each group by one rank; empties the list."""
    owners = owners_by_cost([rounding_cost(group) for group, _ in listed], ranks.size)
    by_owner = [[p for p, who in enumerate(owners) if who == rank] for rank in range(ranks.size)]
    # What goes from one rank to another goes together: a block of many experts has hundreds of groups.
    totals: list[GroupStatistics] = []
    for owner, positions in enumerate(by_owner):
        summed = ranks.folded([listed[position][1] for position in positions], owner, _added)
        totals = totals if summed is None else summed
    own, of_group = by_owner[ranks.rank], [group for group, _ in listed]
    listed.clear()  # the sums are what counts now
    place = {group[0].name: position for position, group in enumerate(of_group)}
    computed: dict[int, Result] = {}
    for part in parts((of_group[position], totals.pop(0)) for position in own):
        computed |= zip((place[group[0].name] for group, _ in part), compute(part), strict=True)
    found = [computed.pop(position) for position in own]
    results: dict[int, Result] = {}
    for owner, positions in enumerate(by_owner):
        results |= zip(positions, ranks.from_owner(found, owner), strict=True)
    for position, group in enumerate(of_group):
        yield group, results.pop(position)


def _more(total: GroupStatistics, part: GroupStatistics) -> GroupStatistics:
    """Statistics with those of further rows; changes them."""
    return iadd(total, part)


def _added(sums: list[GroupStatistics], more: list[GroupStatistics]) -> list[GroupStatistics]:
    """Sums of the statistics of some groups, with those of further rows; changes the sums."""
    return [_more(total, part) for total, part in zip(sums, more, strict=True)]


def rounding_cost(group: Sequence[LinearSpec]) -> float:
    """Milliseconds of a group's rounding on an H200, about.

    The factor of its Gram matrix takes products; it and the column loop take steps, a column after the other; the
    scale search passes over the weights. Of the shape of Llama-3-8B a factor took 90 ms of 14,336 columns and 7.3 of
    4,096, a loop over all formats 6 µs a column, the search 0.06 to 0.09 ns a weight and format.
    """
    inputs, outputs = group[0].in_features, sum(linear.out_features for linear in group)
    return 2.2e-11 * inputs**3 + 7.3e-3 * inputs + 2e-7 * inputs * outputs


def rounded_by_rows(
    ranks: Ranks, group: TaskGroup, compute: Callable[[TaskGroup], Sequence[RoundedLayer]]
) -> list[RoundedLayer]:
    """Layers of one input, of whose rows each rank rounds its share; all have the result.

    Args:
        ranks: The processes, each with the same group.
        group: Layers whose rows do not depend on each other, none with fewer rows than there are ranks.
        compute: Rounds the layers of a group, here with some of their rows each.
    """
    own = group._replace(tasks=[_rows_of(task, ranks) for task in group.tasks])
    if group.statistics is not None and group.statistics.output_drift is not None:  # of a layer alone
        drift = group.statistics.output_drift
        own = own._replace(statistics=replace(group.statistics, output_drift=drift[ranks.share(len(drift))]))
    weights = [_scales_of_metrics(task, own) for task in own.tasks]
    shares = ranks.everywhere(list(zip(compute(own), weights, strict=True)))
    return [_joined(parts) for parts in zip(*shares, strict=True)]


def _rows_of(task: Task, ranks: Ranks) -> Task:
    """A layer with this rank's share of its rows."""
    return replace(task, weight=task.weight[ranks.share(len(task.weight))].contiguous())


def _scales_of_metrics(task: Task, group: TaskGroup) -> tuple[float, float, int]:
    """What metrics of a layer are relative to: power of its outputs, squares of its weights, and its rows."""
    assert group.statistics is not None  # rows of inputs are what ranks share
    power = quadratic_form(task.weight, group.statistics.gram, coarse=True)
    values = torch.stack([power, task.weight.square().sum()]).tolist()
    return values[0], values[1], len(task.weight)


def _joined(parts: Sequence[tuple[RoundedLayer, tuple[float, float, int]]]) -> RoundedLayer:
    """A layer from consecutive parts of its rows, each with its `_scales_of_metrics`."""
    layers = [layer for layer, _ in parts]
    powers, squares, rows = zip(*(scales for _, scales in parts), strict=True)
    joined = replace(
        layers[0].metrics,
        output_error=_mean([layer.metrics.output_error for layer in layers], powers),
        rtn_error=_mean([layer.metrics.rtn_error for layer in layers], powers),
        predicted_error=_mean([layer.metrics.predicted_error for layer in layers], powers),
        weight_error=_mean([layer.metrics.weight_error for layer in layers], squares),
        clip_rate=_mean([layer.metrics.clip_rate for layer in layers], rows),
        seconds=max(layer.metrics.seconds for layer in layers),
    )
    zeros = [layer.zeros for layer in layers if layer.zeros is not None]
    # As bytes: few operations know floats of one byte.
    codes = torch.cat([layer.codes.view(torch.int8) for layer in layers]).view(layers[0].codes.dtype)
    scales = torch.cat([layer.scales for layer in layers])
    return replace(layers[0], codes=codes, scales=scales, zeros=torch.cat(zeros) if zeros else None, metrics=joined)


def _mean(errors: Sequence[float | None], weights: Sequence[float]) -> float:
    """Mean by weight; of parts that weigh nothing all count alike."""
    values, total = [value for value in errors if value is not None], sum(weights)
    if not total > 0:
        return sum(values) / len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total
