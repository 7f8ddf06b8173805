"""Hull and exact against brute force on problems with pins, fused units, ties and scores of any sign; their speed."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest

from hawqtool.allocation import exact
from hawqtool.allocation.frontier import efficient_choices, frontier, solve
from hawqtool.allocation.problem import AllocationProblem, Choice, build_problem
from hawqtool.formats import QuantFormat
from hawqtool.records import LinearSpec, Score, Unit, UnitFormats

WIDTHS = (2, 3, 4, 5, 6, 8)
KINDS = ("falling", "noisy", "negative", "ties")


def value_of(rng: random.Random, kind: str, base: float, bits: int) -> float:
    falling = base * 4.0**-bits
    if kind == "falling":
        return falling
    if kind == "noisy":
        return falling * (1 + rng.gauss(0, 0.5))
    if kind == "negative":
        return rng.gauss(0, base)
    return float(rng.randint(0, 2)) / 4


def random_problem(seed: int, count: int, widths: int) -> tuple[AllocationProblem, UnitFormats]:
    """Units of one to three fused members; a quarter is pinned, some to a width outside the menu."""
    rng, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    units, menu, scores, pins = [], {}, {}, {}
    for index in range(count):
        name, columns = f"u{index}", 32 * rng.randint(1, 4)
        members = [
            LinearSpec(f"{name}.{i}", rng.choice([8, 24, 40, 96]), columns, index, name, 2)
            for i in range(rng.randint(1, 3))
        ]
        units.append(Unit(name, tuple(members)))
        menu[name] = tuple(QuantFormat(b, 32) for b in sorted(rng.sample(WIDTHS, widths)))
        base = 10 ** rng.uniform(-3, 0)
        scores[name] = {f.label: Score(value_of(rng, kind, base, f.bits), 0.0) for f in menu[name]}
        if rng.random() < 0.25:
            pins[name] = QuantFormat(rng.choice((*WIDTHS, 7)), 32)
    return build_problem(units, menu, scores, pins), pins


@pytest.mark.parametrize("seed", range(500))
def test_hull_and_exact_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    problem, pins = random_problem(seed, rng.randint(1, 6), rng.randint(1, 4))
    plans = [
        (sum(c.cost_bytes for c in plan), math.fsum(c.loss for c in plan))
        for plan in itertools.product(*problem.choices.values())
    ]
    curve = frontier(problem)
    for budget in (problem.minimum_bytes, rng.randint(problem.minimum_bytes, problem.maximum_bytes)):
        best = min(loss for stored, loss in plans if stored <= budget)
        hull, proven = solve(problem, budget, curve=curve), exact.solve(problem, budget, curve=curve, gap=0.0)
        place = max(i for i, (stored, _) in enumerate(curve.points) if stored <= budget)
        step = curve.edges[place].gain if place < len(curve.edges) else 0.0
        for plan in (hull, proven):
            assert plan.stored_bytes <= budget and all(plan.formats[unit] == fmt for unit, fmt in pins.items())
            assert plan.lower_bound is not None and plan.lower_bound <= best + 1e-12
        assert proven.predicted_loss == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert hull.predicted_loss is not None
        assert best - 1e-12 <= hull.predicted_loss <= curve.lower_bound(budget) + step + 1e-12
        assert curve.lower_bound(budget) <= best + 1e-12


@pytest.mark.parametrize("seed", range(80))
def test_the_frontier_is_monotone_convex_and_nested(seed: int) -> None:
    problem, pins = random_problem(seed, 40, 4)
    curve = frontier(problem)
    bits = {unit: [choice.cost_bytes for choice in efficient_choices(o)] for unit, o in problem.choices.items()}
    assert curve.points[0][0] <= problem.maximum_bytes and curve.points[0][0] == problem.minimum_bytes
    for (stored, loss), (more, less) in itertools.pairwise(curve.points):
        assert more > stored and less < loss
    slopes = [edge.slope for edge in curve.edges]
    assert slopes == sorted(slopes, reverse=True) and all(slope > 0 for slope in slopes)
    place = dict.fromkeys(problem.choices, 0)
    for edge, (stored, loss) in zip(curve.edges, curve.points[1:], strict=True):
        assert edge.target > place[edge.unit] and edge.unit not in pins, "each step only adds bytes to one unit"
        place[edge.unit] = edge.target
        assert stored == sum(bits[unit][index] for unit, index in place.items())
        chosen = [curve.efficient[unit][index] for unit, index in place.items()]
        assert loss == pytest.approx(math.fsum(choice.loss for choice in chosen), rel=1e-9, abs=1e-12)


def processor_time(count: int) -> float:
    """Least seconds of this thread for a problem of so many units, of some runs."""
    rng = random.Random(0)
    formats = tuple(QuantFormat(bits, 128) for bits in WIDTHS)
    units, scores = [], {}
    for index in range(count):
        rows, columns = rng.choice([(512, 2048), (2048, 512), (1024, 1024)])
        name = f"model.layers.{index}"
        units.append(Unit(name, (LinearSpec(name, rows, columns, index, name, 2),)))
        base = 10 ** rng.uniform(-5, -1)
        scores[name] = {f.label: Score(value_of(rng, "noisy", base, f.bits), 0.0) for f in formats}
    menu, spent = dict.fromkeys(scores, formats), []
    for _ in range(3):
        start = time.thread_time()
        problem = build_problem(units, menu, scores, {})
        plan = solve(problem, problem.budget_bytes(3.5), curve=frontier(problem))
        spent.append(time.thread_time() - start)
    assert plan.bpw <= 3.5
    return min(spent)


def test_time_grows_little_faster_than_the_units() -> None:
    """The machine's own speed does not matter: 13 times as long for ten times the units if it is n log n, 100 if n²."""
    assert processor_time(5000) < 40 * processor_time(500)


def test_finer_units_may_cost_the_hull_and_never_exact() -> None:
    """A small cheap step comes between two large ones, and what is left no longer holds the second large one."""
    low, high = QuantFormat(2, 32), QuantFormat(3, 32)

    def steps(**units: tuple[int, float]) -> AllocationProblem:
        """Units that raise their width for so many bytes and so much less loss."""
        return AllocationProblem(
            {u: (Choice(low, 0, 100.0), Choice(high, cost, 100.0 - gain)) for u, (cost, gain) in units.items()}, 1
        )

    by_block = steps(experts0=(100, 8.0), experts1=(100, 4.0), other=(10, 0.5))
    model_wide = steps(experts=(200, 12.0), other=(10, 0.5))
    hull, wide = solve(by_block, 200), solve(model_wide, 200)
    assert (hull.predicted_loss, wide.predicted_loss) == (300 - 8.5, 200 - 12.0)
    assert exact.solve(by_block, 200).predicted_loss == 300 - 12.0
