"""Bytes of weights that one token reads, as a second budget."""

from __future__ import annotations

import pytest

from hawqtool.allocation.exact import solve
from hawqtool.allocation.problem import build_problem
from hawqtool.allocation.second_cost import active_bytes
from hawqtool.errors import UsageError
from hawqtool.formats import QuantFormat
from hawqtool.records import LinearSpec, Score, Unit

FORMATS = (QuantFormat(2, 32), QuantFormat(4, 32))


def unit(name: str, share: float) -> Unit:
    return Unit(name, (LinearSpec(name, 64, 64, 0, name, 2),), share)


UNITS = (unit("experts", 0.25), unit("attention", 1.0))
MENU = {u.name: FORMATS for u in UNITS}
LOW, HIGH = (UNITS[0].stored_bytes(fmt) for fmt in FORMATS)


def test_experts_count_by_the_share_that_a_token_reads() -> None:
    """Both widths would be worth their bytes to attention; of active bytes experts take a quarter."""
    scores = {u.name: {FORMATS[0].label: Score(1.0, 0.0), FORMATS[1].label: Score(0.0, 0.0)} for u in UNITS}
    problem = build_problem(UNITS, MENU, scores, {})
    second = active_bytes(int(0.25 * HIGH + LOW), UNITS, MENU, {})
    plan = solve(problem, 2 * HIGH, second=second)
    assert plan.formats == {"experts": FORMATS[1], "attention": FORMATS[0]}
    assert plan.cost == pytest.approx(0.25 * HIGH + LOW)


def test_what_is_out_of_reach_is_said_with_the_range() -> None:
    with pytest.raises(UsageError, match="raise --max-active"):
        active_bytes(int(0.25 * LOW + LOW) - 1, UNITS, MENU, {})
    with pytest.raises(UsageError, match="raise --max-active"):
        active_bytes(int(0.25 * HIGH + LOW), UNITS, MENU, {"attention": FORMATS[1]})
