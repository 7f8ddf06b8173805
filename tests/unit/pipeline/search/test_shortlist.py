"""The order of the short list: the least pair loss first, whatever the metrics that proposed the plans say."""

from __future__ import annotations

import pytest

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.search.shortlist import alternatives, pair_loss, predicted_ratio, rule_plan
from hawqtool.records import BitPlan, LinearSpec, Score, SensitivityTable, Unit, UnitScores

LOW, HIGH = QuantFormat(2, 32), QuantFormat(4, 32)
UNITS = [Unit(f"u{i}", (LinearSpec(f"u{i}", 32, 32, i, f"u{i}", 2),)) for i in range(4)]
MENU = {unit.name: (LOW, HIGH) for unit in UNITS}
BUDGET = 3 * UNITS[0].stored_bytes(LOW) + UNITS[0].stored_bytes(HIGH)
AT_LOW = {"u0": [1.0, 1.0, 1.0, 1.0], "u1": [2.0, -2.0, 2.0, -2.0], "u2": [-1.0, 1.0, -1.0, 1.0], "u3": [0.0] * 4}


def raising(name: str) -> UnitScores:
    """Scores that give the only wide format of the budget to one unit."""
    return {u.name: {LOW.label: Score(5.0 if u.name == name else 1.0, 0.1), HIGH.label: Score(0.0, 0.0)} for u in UNITS}


def test_plans_come_by_their_pair_loss() -> None:
    scores = {"kron": raising("u3"), "fisher": raising("u2"), "projection": raising("u1")}
    projections = {unit: {LOW.label: rows, HIGH.label: [0.0] * 4} for unit, rows in AT_LOW.items()}
    table = SensitivityTable(scores, "gptq", "m", "-", {}, {}, projections=projections)
    own = solve(build_problem(UNITS, MENU, scores["kron"], {}), BUDGET, "kron")
    plans = alternatives(UNITS, MENU, table, {}, own, BUDGET)
    # Raising u1 leaves 0 and 2, raising u2 3 and -1.
    losses = {name: pair_loss(plan, table) for name, plan in plans.items()}
    assert losses == pytest.approx({"projection": 1.0, "fisher": 2.5})
    assert list(plans) == ["projection", "fisher"]
    # The rule raises u0, the first block, which leaves p1 + p2 = ±1: ½.
    assert pair_loss(rule_plan(UNITS, MENU, table, {}, own, BUDGET), table) == pytest.approx(0.5)


def uniform(fmt: QuantFormat) -> BitPlan:
    """A uniform plan of the units."""
    return BitPlan({u.name: fmt for u in UNITS}, sum(u.stored_bytes(fmt) for u in UNITS), 4 * 32 * 32)


def test_the_loss_of_a_rival_is_that_of_its_scores_or_lies_on_the_uniform_curve() -> None:
    """Groups of 32 are measured at 2 and 4 bits, with losses of 8 and 2 in all; w3g32 lies half way in bytes."""
    scores = {u.name: {LOW.label: Score(2.0, 0.1), HIGH.label: Score(0.5, 0.1)} for u in UNITS}
    own = BitPlan({u.name: HIGH if i < 2 else LOW for i, u in enumerate(UNITS)}, 1, 1)  # 1 + 4
    assert predicted_ratio(UNITS, uniform(LOW), own, scores, {}) == pytest.approx(8 / 5)
    assert predicted_ratio(UNITS, uniform(QuantFormat(3, 32)), own, scores, {}) == pytest.approx((8 * 2) ** 0.5 / 5)
    assert predicted_ratio(UNITS, uniform(QuantFormat(8, 32)), own, scores, {}) is None  # beyond the curve
    assert predicted_ratio(UNITS, uniform(LOW), own, {}, {}) is None
