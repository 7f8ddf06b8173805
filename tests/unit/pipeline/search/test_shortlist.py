"""The order of the short list: the least pair loss first, whatever the metrics that proposed the plans say."""

from __future__ import annotations

import pytest

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.search.shortlist import alternatives, pair_loss, rule_plan
from hawqtool.records import LinearSpec, Score, SensitivityTable, Unit, UnitScores

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
