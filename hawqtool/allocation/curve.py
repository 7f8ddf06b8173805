"""The whole frontier as a list of plans, with the uniform ones beside it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hawqtool.allocation.frontier import frontier
from hawqtool.allocation.problem import AllocationProblem
from hawqtool.formats import QuantFormat


@dataclass(frozen=True)
class CurvePoint:
    """One plan of the curve.

    Args:
        kind: ``frontier``, or ``uniform`` for one width everywhere but where pins say otherwise.
        bits: The width of a uniform plan.
        stored_bytes: Stored bytes of all units.
        predicted_loss: Sum of the chosen scores, nats per token.
        formats: Unit name to format.
    """

    kind: str
    bits: int | None
    stored_bytes: int
    predicted_loss: float
    formats: dict[str, QuantFormat]


def curve_points(problem: AllocationProblem, count: int | None) -> list[CurvePoint]:
    """Points of the frontier from the cheapest plan to the one of least loss.

    Args:
        problem: The problem.
        count: Points to keep (at least 2), evenly spaced in bytes; all with None.
    """
    curve = frontier(problem)
    kept = set(range(len(curve.points)))
    if count is not None and count < len(kept):
        low, high = curve.points[0][0], curve.points[-1][0]
        budgets = [low + (high - low) * i // (count - 1) for i in range(count)]
        kept = {bisect.bisect_right(curve.points, (budget, math.inf)) - 1 for budget in budgets}
    formats = {unit: options[0].quant_format for unit, options in curve.efficient.items()}
    points = []
    for index, (stored, loss) in enumerate(curve.points):
        if index:
            edge = curve.edges[index - 1]
            formats[edge.unit] = curve.efficient[edge.unit][edge.target].quant_format
        if index in kept:
            points.append(CurvePoint("frontier", None, stored, loss, dict(formats)))
    return points


def uniform_points(
    problem: AllocationProblem, menu: Mapping[str, Sequence[QuantFormat]], pins: Mapping[str, QuantFormat]
) -> list[CurvePoint]:
    """Plans of one width for all units that are not pinned, for each width of the menu.

    Args:
        problem: The problem that was built from menu and pins.
        menu: Unit name to formats, one per width, the same widths for all units.
        pins: Unit name to the format that it must take.
    """
    widths = sorted({fmt.bits for formats in menu.values() for fmt in formats})
    points = []
    for bits in widths:
        formats = {u: pins.get(u) or next(f for f in menu[u] if f.bits == bits) for u in problem.choices}
        chosen = [next(c for c in problem.choices[u] if c.quant_format == f) for u, f in formats.items()]
        stored, loss = sum(c.cost_bytes for c in chosen), math.fsum(c.loss for c in chosen)
        points.append(CurvePoint("uniform", bits, stored, loss, formats))
    return points
