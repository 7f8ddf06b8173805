"""The exact solver against brute force, with losses and sizes of very different magnitudes, and a second budget."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from hawqtool.allocation import exact
from hawqtool.allocation.frontier import frontier, solve
from hawqtool.allocation.problem import AllocationProblem, Choice
from hawqtool.errors import NumericalError, UsageError
from hawqtool.formats import QuantFormat

Plan = tuple[tuple[str, Choice], ...]


def random_problem(seed: int) -> AllocationProblem:
    """By seed: plain; losses over 12 orders of magnitude; equal tiny losses; both with sizes of 1 to 1e9 bytes."""
    rng, kind = random.Random(seed), seed % 4
    choices = {}
    for index in range(rng.randint(1, 5)):
        size = rng.choice([1, 7, 1000, 10**6 + 3, 10**9 + 7]) if kind == 3 else rng.choice([4096, 8192, 12288])
        formats = [QuantFormat(bits, 128) for bits in sorted(rng.sample(range(2, 9), rng.randint(1, 4)))]
        base = 1e-9 if kind == 2 else 10 ** (rng.uniform(-9, 3) if kind else rng.uniform(-4, 0))
        choices[f"u{index}"] = tuple(
            Choice(f, size * f.bits, base * 4.0**-f.bits * (1 if kind == 2 else 1 + rng.gauss(0, 0.3))) for f in formats
        )
    return AllocationProblem(choices, 1000)


def all_plans(problem: AllocationProblem) -> list[Plan]:
    return list(itertools.product(*[[(unit, c) for c in options] for unit, options in problem.choices.items()]))


def size(plan: Plan) -> int:
    return sum(choice.cost_bytes for _, choice in plan)


def loss(plan: Plan) -> float:
    return math.fsum(choice.loss for _, choice in plan)


@pytest.mark.parametrize("seed", range(200))
def test_the_optimum_of_brute_force(seed: int) -> None:
    problem, rng = random_problem(seed), random.Random(seed)
    plans = all_plans(problem)
    smallest = min(map(size, plans))
    for budget in {smallest, *(max(smallest, size(rng.choice(plans)) - rng.randint(0, 1)) for _ in range(5))}:
        plan, hull = exact.solve(problem, budget, "kron"), solve(problem, budget)
        best = min(loss(p) for p in plans if size(p) <= budget)
        chosen = [next(c for c in problem.choices[u] if c.quant_format == f) for u, f in plan.formats.items()]
        assert plan.stored_bytes == sum(c.cost_bytes for c in chosen) <= budget
        assert list(plan.formats) == list(problem.choices)
        assert plan.predicted_loss is not None and hull.predicted_loss is not None and plan.lower_bound is not None
        assert plan.predicted_loss == pytest.approx(best, rel=1e-9, abs=0)
        assert plan.lower_bound <= best + 1e-12 * abs(best) + 1e-15
        curve = frontier(problem)
        on_hull = max(i for i, (stored, _) in enumerate(curve.points) if stored <= budget)
        assert plan.predicted_loss <= hull.predicted_loss <= curve.points[on_hull][1] + 1e-12 * curve.points[0][1]


@pytest.mark.parametrize("seed", range(60))
def test_two_budgets_against_brute_force(seed: int) -> None:
    problem, rng = random_problem(seed), random.Random(seed)
    costs = {
        u: {c.quant_format: rng.choice([rng.random(), 1e-9 * c.cost_bytes]) for c in options}
        for u, options in problem.choices.items()
    }
    plans = all_plans(problem)
    for _ in range(4):
        budget = size(rng.choice(plans))
        limit = rng.choice([0.7, 1, 1.2]) * math.fsum(costs[u][c.quant_format] for u, c in rng.choice(plans))
        second = exact.SecondCost(costs, limit)
        fitting = [p for p in plans if size(p) <= budget and second.allows({u: c.quant_format for u, c in p})]
        if not fitting:
            with pytest.raises(UsageError, match="second budget"):
                exact.solve(problem, budget, second=second)
            continue
        plan = exact.solve(problem, budget, second=second)
        assert plan.stored_bytes <= budget and second.allows(plan.formats) and plan.max_cost == limit
        assert plan.predicted_loss == pytest.approx(min(map(loss, fitting)), rel=1e-9, abs=0)


def test_a_time_limit_is_an_error_and_the_order_of_units_does_not_matter() -> None:
    rng = random.Random(0)
    formats = [QuantFormat(bits, 128) for bits in (2, 3, 4, 8)]
    choices = {
        f"u{i}": tuple(Choice(f, 4096 * f.bits * (1 + i % 3), rng.random() * 4.0**-f.bits) for f in formats)
        for i in range(60)
    }
    problem = AllocationProblem(choices, 60 * 4096 * 16)
    budget = problem.minimum_bytes * 3 // 2 + 4096
    turned = AllocationProblem(dict(reversed(choices.items())), problem.num_weights)
    assert exact.solve(problem, budget).formats == exact.solve(turned, budget).formats
    with pytest.raises(NumericalError, match="proven optimal within 0 s.*--solver hull"):
        exact.solve(problem, budget, time_limit=0)
