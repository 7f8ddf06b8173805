"""Ranks as threads of one process, so that what several make of their shares can be compared with what one makes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

from hawqtool.runtime.ranks import Ranks


class Crew:
    """What all threads see."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)


class ThreadRank(Ranks):
    """A rank of a crew; values go through the slots, one exchange at a time."""

    def __init__(self, rank: int, crew: Crew) -> None:
        super().__init__(rank, len(crew.slots))
        self.crew = crew

    def folded(self, value: Any, owner: int, add: Callable[[Any, Any], Any], start: Any = None) -> Any:
        values = self._exchanged(value)
        if self.rank != owner:
            return None
        return reduce(add, values) if start is None else reduce(add, values, start)

    def from_owner(self, value: Any, owner: int) -> Any:
        return self._exchanged(value)[owner]

    def _team(self, count: int, number: int, place: int) -> Ranks | None:
        crews = self._exchanged([Crew(self.size // count) for _ in range(count)])[0]
        if number >= count:
            return None
        team = ThreadRank(place, crews[number])
        team.kept = self.kept
        return team

    def _exchanged(self, value: Any) -> list[Any]:
        self.crew.slots[self.rank] = value
        self.crew.barrier.wait(600)
        values = list(self.crew.slots)
        self.crew.barrier.wait(600)
        return values


def by_crew(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each of so many ranks returns; what one raises is raised here."""
    crew = Crew(size)

    def of_rank(rank: int) -> Any:
        try:
            return work(ThreadRank(rank, crew))
        except BaseException:
            crew.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return [done.result() for done in [threads.submit(of_rank, rank) for rank in range(size)]]
