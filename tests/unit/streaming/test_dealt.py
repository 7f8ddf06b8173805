"""Work dealt to ranks by its cost."""

from __future__ import annotations

from hawqtool.streaming.dealt import owners_by_cost


def test_the_costliest_goes_first_and_loads_are_even() -> None:
    owners = owners_by_cost([1.0, 8.0, 3.0, 4.0, 2.0], 2)
    loads = [sum(cost for cost, owner in zip([1, 8, 3, 4, 2], owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert loads == [9, 9]
    assert owners[1] == 0


def test_equal_costs_alternate() -> None:
    assert owners_by_cost([5.0] * 4, 2) == [0, 1, 0, 1]
    assert owners_by_cost([], 3) == []
