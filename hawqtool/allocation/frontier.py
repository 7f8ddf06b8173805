"""The Pareto frontier of bytes against predicted loss, and the plan that fits a budget."""

from __future__ import annotations

import bisect
import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hawqtool.allocation.problem import AllocationProblem, Choice, require_feasible
from hawqtool.records import BitPlan, Menu, UnitFormats


@dataclass(frozen=True)
class Edge:
    """A step of one unit from one point of its hull to the next.

    Args:
        unit: The unit.
        target: Index into the unit's efficient choices (see `efficient_choices`).
        cost_bytes: Bytes that the step adds.
        gain: Loss that it removes; positive.
    """

    unit: str
    target: int
    cost_bytes: int
    gain: float

    @property
    def slope(self) -> float:
        """Loss removed per byte."""
        return self.gain / self.cost_bytes

    @property
    def rank(self) -> tuple[float, float, str, int]:
        """Sort key: steepest first, then bigger gain, then name."""
        return (-self.slope, -self.gain, self.unit, self.target)


@dataclass(frozen=True)
class Frontier:
    """Nested plans, each optimal at its own byte count.

    Args:
        points: ``(stored bytes, predicted loss)`` from the cheapest plan on; bytes rise, losses fall.
        edges: ``edges[i]`` leads from ``points[i]`` to ``points[i + 1]``.
        efficient: Choices of every unit worth taking: each costs more and loses less than the one before.
    """

    points: list[tuple[int, float]]
    edges: list[Edge]
    efficient: dict[str, tuple[Choice, ...]]

    def price(self, budget_bytes: int) -> float:
        """Loss per byte of the step that no longer fits into a budget; 0 where all steps fit."""
        index = bisect.bisect_right(self.points, (budget_bytes, math.inf)) - 1
        return self.edges[index].slope if 0 <= index < len(self.edges) else 0.0

    def lower_bound(self, budget_bytes: int) -> float:
        """Loss below which no plan within the budget can fall (the linear relaxation); inf below the cheapest plan."""
        index = bisect.bisect_right(self.points, (budget_bytes, math.inf)) - 1
        if index < 0:
            return math.inf
        stored, loss = self.points[index]
        return loss - self.price(budget_bytes) * (budget_bytes - stored)


def efficient_choices(options: Sequence[Choice]) -> tuple[Choice, ...]:
    """Choices that no cheaper (or equally cheap) choice beats, cheapest first.

    Scores are estimates and may rise with the width or be negative; a choice that costs more and does not
    lose less is dropped here, so it is never taken.
    """
    kept: list[Choice] = []
    for choice in sorted(options, key=lambda c: (c.cost_bytes, c.loss, c.quant_format)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return tuple(kept)


def _hull_edges(unit: str, efficient: Sequence[Choice]) -> list[Edge]:
    """Edges of the lower convex hull of (bytes, loss); slopes strictly fall, so sorting keeps their order."""
    places, edges = [0], list[Edge]()
    for index in range(1, len(efficient)):
        edge = _edge(unit, efficient, places[-1], index)
        while edges and edges[-1].slope <= edge.slope:
            edges.pop()
            places.pop()
            edge = _edge(unit, efficient, places[-1], index)
        edges.append(edge)
        places.append(index)
    return edges


def _edge(unit: str, efficient: Sequence[Choice], source: int, target: int) -> Edge:
    start, end = efficient[source], efficient[target]
    return Edge(unit, target, end.cost_bytes - start.cost_bytes, start.loss - end.loss)


def frontier(problem: AllocationProblem) -> Frontier:
    """Merge the convex hulls of all units by slope: the whole frontier at once.

    Ties are broken by bigger gain, then by unit name, so that the result does not depend on the order of units.
    """
    efficient = {unit: efficient_choices(options) for unit, options in problem.choices.items()}
    edges = [edge for unit, options in efficient.items() for edge in _hull_edges(unit, options)]
    edges.sort(key=lambda edge: edge.rank)
    stored = sum(options[0].cost_bytes for options in efficient.values())
    loss = math.fsum(options[0].loss for options in efficient.values())
    points = [(stored, loss)]
    for edge in edges:
        stored, loss = stored + edge.cost_bytes, loss - edge.gain
        points.append((stored, loss))
    return Frontier(points, edges, efficient)


def solve(
    problem: AllocationProblem, budget_bytes: int, metric: str | None = None, curve: Frontier | None = None
) -> BitPlan:
    """Plan of small predicted loss within a budget: the frontier point that fits, then the slack filled.

    The slack goes, steepest first, to any single-unit upgrade that still fits, on the hull or not. Since this
    order is the frontier's own, a larger budget never gives a larger predicted loss: where two budgets first
    differ, the larger one takes a step that is at least as steep as all that the smaller can still take, and longer.

    Args:
        problem: The problem.
        budget_bytes: Most stored bytes allowed.
        metric: Name of the scores, for the record.
        curve: ``frontier(problem)`` if it is at hand.

    Raises:
        UsageError: If even the cheapest choices exceed the budget.
    """
    start = time.monotonic()
    require_feasible(problem, budget_bytes)
    curve = curve or frontier(problem)
    place = dict.fromkeys(problem.choices, 0)
    count = bisect.bisect_right(curve.points, (budget_bytes, math.inf)) - 1
    for edge in curve.edges[:count]:
        place[edge.unit] = edge.target
    _fill(place, curve.efficient, budget_bytes - curve.points[count][0])
    chosen = {unit: curve.efficient[unit][index] for unit, index in place.items()}
    loss = math.fsum(choice.loss for choice in chosen.values())
    return BitPlan(
        formats={unit: choice.quant_format for unit, choice in chosen.items()},
        stored_bytes=sum(choice.cost_bytes for choice in chosen.values()),
        num_weights=problem.num_weights,
        budget_bytes=budget_bytes,
        predicted_loss=loss,
        metric=metric,
        solver="hull",
        # The points are running sums, which may end an ulp above the plan's own.
        lower_bound=min(curve.lower_bound(budget_bytes), loss),
        seconds=time.monotonic() - start,
    )


def _fill(place: dict[str, int], efficient: dict[str, tuple[Choice, ...]], slack: int) -> None:
    """Upgrade units in ``place`` in order of slope until nothing fits into ``slack`` bytes."""

    def upgrades(unit: str) -> list[tuple[tuple[float, float, str, int], int, Edge]]:
        source, options = place[unit], efficient[unit]
        edges = [_edge(unit, options, source, target) for target in range(source + 1, len(options))]
        return [(edge.rank, source, edge) for edge in edges if edge.cost_bytes <= slack]

    queue = [entry for unit in place for entry in upgrades(unit)]
    heapq.heapify(queue)
    while queue:
        _, source, edge = heapq.heappop(queue)
        # An entry is stale once its unit has moved; what does not fit now never will, as the slack only shrinks.
        if place[edge.unit] != source or edge.cost_bytes > slack:
            continue
        place[edge.unit] = edge.target
        slack -= edge.cost_bytes
        for entry in upgrades(edge.unit):
            heapq.heappush(queue, entry)


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
    formats: UnitFormats


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


def uniform_points(problem: AllocationProblem, menu: Menu, pins: UnitFormats) -> list[CurvePoint]:
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
