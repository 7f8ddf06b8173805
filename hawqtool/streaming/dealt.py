"""Work on input groups that do not depend on each other, dealt to the ranks of a run by its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import iadd
from typing import TypeVar

from hawqtool.records import LinearSpec
from hawqtool.rounding.spec import InputGroup, InputGroups
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.runtime.ranks import Ranks, owners_by_cost

Result = TypeVar("Result")


def dealt(
    ranks: Ranks,
    groups: InputGroups,
    compute: Callable[[Sequence[InputGroup]], Sequence[Result]],
    parts: Callable[[InputGroups], Iterable[Sequence[InputGroup]]],
) -> Iterator[tuple[Sequence[LinearSpec], Result]]:
    """Each group with what ``compute`` makes of its statistics on all rows; one rank does it, all have the result.

    Statistics are summed in the order of the ranks. One process alone has those of one part in memory at a time.

    Args:
        ranks: The processes, each with the same groups.
        groups: Input groups that do not depend on each other's results.
        compute: From a part to the result of each of its groups. It may fall to any rank, so it must not depend on
            anything that only one has.
        parts: Groups that are computed together, some at a time; their order may change.
    """
    if ranks.size == 1:
        for part in parts(groups):
            for (group, _), result in zip(part, compute(part), strict=True):
                yield group, result
        return
    listed = list(groups)
    owners = owners_by_cost([rounding_cost(group) for group, _ in listed], ranks.size)
    by_owner = [[p for p, who in enumerate(owners) if who == rank] for rank in range(ranks.size)]
    # What goes from one rank to another goes together: a block of many experts has hundreds of groups.
    totals: list[GroupStatistics] = []
    for owner, positions in enumerate(by_owner):
        summed = ranks.folded([listed[position][1] for position in positions], owner, _added)
        totals = totals if summed is None else summed
    own, of_group = by_owner[ranks.rank], [group for group, _ in listed]
    del listed  # the sums are what counts now
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


def _added(sums: list[GroupStatistics], more: list[GroupStatistics]) -> list[GroupStatistics]:
    """Sums of the statistics of some groups, with those of further rows; changes the sums."""
    return [iadd(total, part) for total, part in zip(sums, more, strict=True)]


def rounding_cost(group: Sequence[LinearSpec]) -> float:
    """Operations of a group's rounding, about: the factor of its Gram matrix, and two passes of the column loop."""
    inputs = group[0].in_features
    return inputs**3 + 2 * inputs**2 * sum(linear.out_features for linear in group)
