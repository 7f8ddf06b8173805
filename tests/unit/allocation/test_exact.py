"""The exact solver against brute force, with losses and sizes of very different magnitudes, and a second budget."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import OptimizeResult

from hawqtool.allocation import exact
from hawqtool.allocation import milp as core
from hawqtool.allocation.frontier import frontier, solve
from hawqtool.allocation.problem import AllocationProblem, Choice
from hawqtool.errors import NumericalError, UsageError
from hawqtool.formats import QuantFormat
from hawqtool.runtime.stdout import stdout_discarded

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


def random_costs(problem: AllocationProblem, rng: random.Random) -> dict[str, dict[QuantFormat, float]]:
    return {
        u: {c.quant_format: rng.choice([rng.random(), 1e-9 * c.cost_bytes]) for c in options}
        for u, options in problem.choices.items()
    }


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
        plan, hull = exact.solve(problem, budget, "kron", gap=0.0), solve(problem, budget)
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
    costs, plans = random_costs(problem, rng), all_plans(problem)
    for _ in range(4):
        budget = size(rng.choice(plans))
        limit = rng.choice([0.7, 1, 1.2]) * math.fsum(costs[u][c.quant_format] for u, c in rng.choice(plans))
        second = exact.SecondCost(costs, limit)
        fitting = [p for p in plans if size(p) <= budget and second.allows({u: c.quant_format for u, c in p})]
        if not fitting:
            with pytest.raises(UsageError, match="second budget"):
                exact.solve(problem, budget, second=second, gap=0.0)
            continue
        plan = exact.solve(problem, budget, second=second, gap=0.0)
        assert plan.stored_bytes <= budget and second.allows(plan.formats) and plan.max_cost == limit
        assert plan.predicted_loss == pytest.approx(min(map(loss, fitting)), rel=1e-9, abs=0)


def many_units(count: int) -> AllocationProblem:
    rng = random.Random(0)
    formats = [QuantFormat(bits, 128) for bits in (2, 3, 4, 8)]
    choices = {
        f"u{i}": tuple(Choice(f, 4096 * f.bits * (1 + i % 3), rng.random() * 4.0**-f.bits) for f in formats)
        for i in range(count)
    }
    return AllocationProblem(choices, count * 4096 * 16)


def test_the_order_of_units_does_not_matter() -> None:
    problem = many_units(60)
    budget = problem.minimum_bytes * 3 // 2 + 4096
    turned = AllocationProblem(dict(reversed(problem.choices.items())), problem.num_weights)
    for gap in (0.0, exact.GAP):
        plan = exact.solve(problem, budget, gap=gap)
        assert plan.formats == exact.solve(turned, budget, gap=gap).formats
        assert plan.solver == "exact" and plan.gap is not None and plan.gap <= gap + 1e-8
        assert plan.seconds is not None and 0 < plan.seconds < 60


def test_the_gap_ends_the_search() -> None:
    problem = many_units(60)
    budget = problem.minimum_bytes * 3 // 2 + 4096
    optimum = exact.solve(problem, budget, gap=0.0).predicted_loss or 0.0
    for gap in (1e-3, 1e-2, 0.1):
        plan = exact.solve(problem, budget, gap=gap)
        assert plan.gap is not None and plan.gap <= gap
        assert optimum <= (plan.predicted_loss or 0.0) <= optimum * (1 + gap) / (1 - gap)
        assert (plan.lower_bound or 0.0) <= optimum


def test_at_the_time_limit_the_best_plan_so_far_is_returned_with_its_gap() -> None:
    problem = many_units(60)
    budget = problem.minimum_bytes * 3 // 2 + 4096
    plan, hull = exact.solve(problem, budget, time_limit=0, gap=0.0), solve(problem, budget)
    assert plan.solver == "exact (out of time)" and plan.formats == hull.formats
    assert plan.lower_bound == pytest.approx(hull.lower_bound) and plan.gap == pytest.approx(hull.gap)
    assert plan.gap is not None and plan.gap > 0


def test_at_the_time_limit_without_a_plan_that_meets_both_budgets_it_is_an_error() -> None:
    problem = many_units(60)
    rng = random.Random(1)
    costs = {u: {c.quant_format: rng.random() for c in options} for u, options in problem.choices.items()}
    cheapest = replace(
        problem,
        choices={u: tuple(replace(c, loss=costs[u][c.quant_format]) for c in o) for u, o in problem.choices.items()},
    )
    # A budget at which the frontier's plan of least second cost is not the optimum.
    budgets = range(problem.minimum_bytes * 4 // 3, problem.maximum_bytes, 4096)
    budget = next(b for b in budgets if (solve(cheapest, b).gap or 0) > 1e-3)
    least = exact.solve(cheapest, budget, gap=0.0).predicted_loss or 0.0
    second = exact.SecondCost(costs, least)
    assert exact.solve(problem, budget, second=second).cost == pytest.approx(least)
    with pytest.raises(NumericalError, match="found in time, nor proven not to exist"):
        exact.solve(problem, budget, second=second, time_limit=0)
    with pytest.raises(UsageError, match=r"costs from .* are in reach"):
        exact.solve(problem, budget, second=exact.SecondCost(costs, least * 0.9), time_limit=0)


def test_a_failure_of_highs_leaves_the_plan_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = OptimizeResult(status=4, x=None, message="unknown", mip_dual_bound=None)
    monkeypatch.setattr(core, "milp", lambda *_, **__: failed)
    problem = many_units(60)
    plan = exact.solve(problem, problem.minimum_bytes * 3 // 2 + 4096, gap=0.0)
    assert plan.solver == "exact (HiGHS failed)" and plan.gap is not None and plan.gap > 0


class LazySolver:
    """HiGHS at its laziest: of all solutions within its tolerance and the relative gap asked for, the worst."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def __call__(self, objective: Any, integrality: Any, bounds: Any, constraints: Any, options: Any) -> OptimizeResult:
        matrix, count = constraints.A.toarray(), int(integrality.sum())
        taken = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        spent = taken @ matrix[:, :count].T
        budgets = matrix[:, count:].any(axis=1)
        left = (constraints.ub - spent)[:, budgets]
        inside = (constraints.lb - self.tolerance <= spent) & (spent <= constraints.ub + self.tolerance)
        fits = inside[:, ~budgets].all(axis=1) & (left >= -self.tolerance).all(axis=1)
        fits &= (left <= bounds.ub[count:] + self.tolerance).all(axis=1)
        if not fits.any():
            return OptimizeResult(status=2, x=None, mip_dual_bound=None)
        values = np.where(fits, taken @ objective[:count] + left @ objective[count:], np.inf)
        close = np.where(values * (1 - options["mip_rel_gap"]) <= values.min(), values, -np.inf)
        worst = int(close.argmax())
        return OptimizeResult(status=0, x=taken[worst], mip_dual_bound=values.min())


def signed_problem(seed: int) -> AllocationProblem:
    """Losses of both signs, as those of a Hessian are, whose sum is small beside what the frontier's plan loses."""
    rng = random.Random(seed)
    formats = [QuantFormat(bits, 128) for bits in (2, 3, 4)]
    losses = [sorted((rng.gauss(0, 1) for _ in formats), reverse=True) for _ in range(7)]
    sizes = [rng.randrange(1000, 2000) for _ in losses]
    choices = {
        f"u{i}": tuple(Choice(f, s * f.bits, x) for f, x in zip(formats, values, strict=True))
        for i, (s, values) in enumerate(zip(sizes, losses, strict=True))
    }
    return AllocationProblem(choices, 1000)


@pytest.mark.parametrize("seed", [89, 109, 115, 116, 143])
def test_the_gap_is_that_of_the_plan_that_is_returned(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a worse plan known before, of which a small share may be more than all of the best loss."""
    problem, gap = signed_problem(seed), 0.5
    plans, budget = all_plans(problem), (problem.minimum_bytes + problem.maximum_bytes) // 2
    best, hull = min(loss(p) for p in plans if size(p) <= budget), solve(problem, budget).predicted_loss or 0.0
    first, *others = problem.choices
    offset = best + 0.01 * (hull - best)
    moved = {first: tuple(replace(c, loss=c.loss - offset) for c in problem.choices[first])}
    problem = replace(problem, choices=moved | {unit: problem.choices[unit] for unit in others})
    best = min(loss(p) for p in all_plans(problem) if size(p) <= budget)
    monkeypatch.setattr(core, "milp", LazySolver(0.0))
    plan = exact.solve(problem, budget, gap=gap)
    assert plan.solver == "exact" and plan.predicted_loss is not None
    assert plan.predicted_loss - best <= gap * abs(plan.predicted_loss) + 1e-12


def test_a_plan_over_the_second_budget_by_less_than_the_tolerance_of_highs_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, high = QuantFormat(2, 128), QuantFormat(4, 128)
    choices = {f"u{i}": (Choice(low, 200, 1.0 + 0.1 * i), Choice(high, 400, 0.1)) for i in range(4)}
    problem = AllocationProblem(choices, 1000)
    costs = {unit: {low: 0.0, high: 1.0 + (1e-7 if unit == "u3" else 0.0)} for unit in choices}
    second = exact.SecondCost(costs, 2.0)
    monkeypatch.setattr(core, "milp", LazySolver(1e-6))
    plan = exact.solve(problem, 1600, second=second, gap=0.0)
    assert second.allows(plan.formats)
    assert plan.predicted_loss == pytest.approx(1.0 + 1.3 + 0.1 + 0.1)


def test_nothing_is_printed_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with stdout_discarded():
        libc.puts(b"a print of a library")
        os.write(1, b"another one")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out.splitlines() == ["before", "after"]
    # HiGHS repairs a solution of each of these and says so.
    for seed in (227, 234, 421):
        problem, rng = random_problem(seed), random.Random(seed)
        costs, plans = random_costs(problem, rng), all_plans(problem)
        budget = size(rng.choice(plans))
        limit = rng.choice([0.7, 1, 1.2]) * math.fsum(costs[u][c.quant_format] for u, c in rng.choice(plans))
        exact.solve(problem, budget, second=exact.SecondCost(costs, limit), gap=0.0)
    libc.fflush(None)
    assert capfd.readouterr().out == ""
