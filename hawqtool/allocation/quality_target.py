"""The smallest plan on a frontier whose measured quality meets a bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class MeasuredPlan:
    """A budget that was tried: the plan's stored bytes and its measured divergence."""

    stored_bytes: int
    measured: float


@dataclass(frozen=True)
class Bracket:
    """What a search found.

    Args:
        measured_plans: Everything that was measured, in order.
        met: The smallest plan that meets the bound; None if none does.
        missed: The largest plan below ``met`` that does not; None if even the smallest plan meets the bound.
    """

    measured_plans: tuple[MeasuredPlan, ...]
    met: MeasuredPlan | None
    missed: MeasuredPlan | None


def smallest_meeting(
    points: list[tuple[int, float]],
    measure: Callable[[int], MeasuredPlan],
    bound: float,
    tolerance: float = 0.01,
    limit: int = 8,
) -> Bracket:
    """Bisect a frontier with real measurements, as Hessian-guided bisection does (arXiv 2306.04879).

    Predictions are wrong by a factor that changes slowly along the frontier, so the next budget is where the
    prediction, multiplied by measured/predicted at the nearest end of the bracket, equals the bound; a guess that
    lies in the outer tenth of the bracket gives way to its middle, so the bracket shrinks as in bisection.

    Args:
        points: ``(stored bytes, predicted loss)`` of the frontier, bytes rising, losses falling.
        measure: Rounds and measures the plan of so many bytes at most.
        bound: Largest divergence that meets the target.
        tolerance: Stop when the smallest plan that meets it is within this fraction of the largest that does not.
        limit: Most measurements.
    """
    low, high = points[0][0], points[-1][0]
    measured_plans: list[MeasuredPlan] = []
    met: MeasuredPlan | None = None
    missed: MeasuredPlan | None = None
    ratio = 1.0
    while len(measured_plans) < limit:
        budget = _next_budget(points, bound / ratio, low, high, missed, met)
        found = measure(budget)
        measured_plans.append(found)
        predicted = _predicted(points, found.stored_bytes)
        if found.measured > 0 and predicted > 0:
            ratio = found.measured / predicted
        if found.measured <= bound:
            met = found if met is None or found.stored_bytes < met.stored_bytes else met
            high = min(high, found.stored_bytes)
        else:
            missed = found if missed is None or found.stored_bytes > missed.stored_bytes else missed
            low = max(low, budget)
        if _settled(points, met, missed, low, high, tolerance):
            break
    return Bracket(tuple(measured_plans), met, missed)


def _settled(
    points: list[tuple[int, float]],
    met: MeasuredPlan | None,
    missed: MeasuredPlan | None,
    low: int,
    high: int,
    tolerance: float,
) -> bool:
    if met is None:
        return missed is not None and missed.stored_bytes >= points[-1][0]
    if met.stored_bytes <= points[0][0]:
        return True
    return missed is not None and (high <= low * (1 + tolerance) or not any(low < b < high for b, _ in points))


def _next_budget(
    points: list[tuple[int, float]],
    wanted: float,
    low: int,
    high: int,
    missed: MeasuredPlan | None,
    met: MeasuredPlan | None,
) -> int:
    """Bytes at which the frontier predicts ``wanted``, kept inside the bracket."""
    guess = next((stored for stored, loss in points if loss <= wanted), points[-1][0])
    if met is None and missed is None:
        return guess
    margin = (high - low) // 10
    # An end that was not tried may be the answer, so a guess at it or beyond it is tried there.
    if met is None and guess >= high:
        return high
    if missed is None and guess <= low:
        return low
    if low + margin <= guess <= high - margin:
        return guess
    return (low + high) // 2


def _predicted(points: list[tuple[int, float]], stored_bytes: int) -> float:
    return next((loss for stored, loss in reversed(points) if stored <= stored_bytes), math.nan)
