"""The search for the smallest plan that meets a quality bound."""

from __future__ import annotations

import math

import pytest

from hawqtool.allocation.quality_target import MeasuredPlan, smallest_meeting

POINTS = [(1000 + 10 * step, 2.0 * math.exp(-step / 20)) for step in range(101)]


def truth(stored: int, factor: float, bend: float) -> float:
    loss = next(loss for b, loss in reversed(POINTS) if b <= stored)
    return factor * loss**bend


def search(bound: float, factor: float = 1.0, bend: float = 1.0, limit: int = 8):  # noqa: ANN201
    tried: list[int] = []

    def measure(budget: int) -> MeasuredPlan:
        tried.append(budget)
        stored = max(b for b, _ in POINTS if b <= budget)
        return MeasuredPlan(stored, truth(stored, factor, bend))

    return smallest_meeting(POINTS, measure, bound, limit=limit), tried


@pytest.mark.parametrize("factor", [0.2, 1.0, 2.5, 6.0])
@pytest.mark.parametrize("bend", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("bound", [0.1, 0.3, 1.0])
def test_the_bracket_closes_to_one_percent(bound: float, factor: float, bend: float) -> None:
    found, tried = search(bound, factor, bend)
    best = next((b for b, _ in POINTS if truth(b, factor, bend) <= bound), None)
    if best is None:
        assert found.met is None and found.missed is not None and found.missed.stored_bytes == POINTS[-1][0]
    else:
        assert found.met is not None and found.met.measured <= bound
        assert found.met.stored_bytes <= best * 1.02
        assert found.missed is None or found.missed.measured > bound
    assert len(tried) <= 8 and len(set(tried)) == len(tried)


def test_the_smallest_plan_is_enough_when_it_meets_the_bound() -> None:
    found, tried = search(5.0)
    assert found.met == MeasuredPlan(1000, 2.0) and found.missed is None
    assert tried == [1000]


def test_an_unreachable_bound_ends_at_the_largest_plan() -> None:
    found, tried = search(1e-6)
    assert found.met is None
    assert tried[-1] == POINTS[-1][0]


def test_the_limit_holds() -> None:
    found, tried = search(0.3, factor=2.0, limit=2)
    assert len(found.measured_plans) == len(tried) == 2
