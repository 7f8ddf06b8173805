"""How long the solvers take and how close they come: frontier, hull and HiGHS with one budget and with two.

Units of random sizes and scores at six widths; the second cost is a unit's bytes times a random factor. The counts
are those of a dense model of 56 blocks with 4 units each, one of 140, and a large mixture with a unit per expert.

    python scripts/benchmarks/benchmark_solvers.py [--units 224 560 18624] [--seconds 60]
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hawqtool.allocation import exact
from hawqtool.allocation.frontier import frontier, solve
from hawqtool.allocation.problem import AllocationProblem, build_problem
from hawqtool.errors import HawqError
from hawqtool.formats import QuantFormat
from hawqtool.records import BitPlan, LinearSpec, Menu, Score, Unit, UnitScores

WIDTHS = (2, 3, 4, 5, 6, 8)
SHAPES = ((512, 2048), (2048, 512), (1024, 1024), (3072, 1024))
TARGET = 3.5
Menu = Menu
T = TypeVar("T")


def measured(count: int, seed: int = 0) -> tuple[list[Unit], Menu, UnitScores]:
    """Units, menu and scores of a model with ``count`` units."""
    rng = random.Random(seed)
    formats = tuple(QuantFormat(bits, 128) for bits in WIDTHS)
    units, scores = [], {}
    for index in range(count):
        name, (rows, columns) = f"u{index}", rng.choice(SHAPES)
        units.append(Unit(name, (LinearSpec(name, rows, columns, index, name, 2),)))
        base = 10 ** rng.uniform(-5, -1)
        scores[name] = {f.label: Score(base * 4.0**-f.bits * (1 + rng.gauss(0, 0.2)), 0.0) for f in formats}
    return units, dict.fromkeys(scores, formats), scores


def second_cost(problem: AllocationProblem, hull: BitPlan, seed: int = 1) -> exact.SecondCost:
    """Costs that follow bytes loosely, with a limit 3 % below what the frontier's plan costs."""
    rng = random.Random(seed)
    costs = {
        unit: {c.quant_format: c.cost_bytes * rng.uniform(0.5, 1.5) for c in options}
        for unit, options in problem.choices.items()
    }
    return exact.SecondCost(costs, 0.97 * math.fsum(costs[unit][fmt] for unit, fmt in hull.formats.items()))


def show(count: int, name: str, run: Callable[[], T]) -> T | None:
    """Print the row of a run; its result, or None if it failed."""
    start = time.perf_counter()
    try:
        result = run()
        text = ""
        if isinstance(result, BitPlan):
            note = (result.solver or "").partition(" ")[2]
            text = f"{result.predicted_loss:15.9g} {result.gap:9.2e} {note}"
    except HawqError as error:
        result, text = None, str(error)
    print(f"{count:7,} {name:28} {time.perf_counter() - start:8.3f} {text}", flush=True)
    return result


def benchmark(count: int, seconds: float) -> None:
    """Rows of one size."""
    units, menu, scores = measured(count)
    problem = show(count, "build_problem", lambda: build_problem(units, menu, scores, {}))
    assert problem is not None
    curve = show(count, "frontier", lambda: frontier(problem))
    budget = problem.budget_bytes(TARGET)
    hull = show(count, "hull", lambda: solve(problem, budget, curve=curve))
    assert hull is not None
    second = second_cost(problem, hull)
    for name, gap, both in (
        ("exact, gap 1e-4", exact.GAP, None),
        ("exact, gap 0", 0.0, None),
        ("exact, gap 1e-4, two budgets", exact.GAP, second),
    ):
        run = partial(exact.solve, problem, budget, curve=curve, second=both, time_limit=seconds, gap=gap)
        show(count, name, run)


def main() -> None:
    """Print one row per size and solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[224, 560, 18_624])
    parser.add_argument("--seconds", type=float, default=exact.TIME_LIMIT)
    arguments = parser.parse_args()
    print(f"{'units':>7} {'solver':28} {'seconds':>8} {'predicted loss':>15} {'gap':>9}")
    for count in arguments.units:
        benchmark(count, arguments.seconds)


if __name__ == "__main__":
    main()
