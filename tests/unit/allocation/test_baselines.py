"""Plans to compare with: permuted and reversed scores."""

from __future__ import annotations

import random
from collections import Counter

from hawqtool.allocation.baselines import permuted_scores, reversed_scores
from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem
from hawqtool.formats import QuantFormat
from hawqtool.records import LinearSpec, Menu, Score, Unit, UnitScores

WIDTHS = (2, 3, 4, 8)
BLOCKS = 5


def make_units() -> list[Unit]:
    """Per block a fused unit of two linears and one of a single linear, whose inputs take groups of 32 only."""
    units = []
    for block in range(BLOCKS):
        pair = [LinearSpec(f"{block}.{p}", 64, 128, block, f"{block}.pair", 2) for p in "gu"]
        units += [
            Unit(f"{block}.pair", tuple(pair)),
            Unit(f"{block}.down", (LinearSpec(f"{block}.down", 128, 96, block, f"{block}.down", 2),)),
        ]
    return units


def menu_of(units: list[Unit]) -> Menu:
    return {u.name: tuple(QuantFormat(b, 32 if "down" in u.name else 128) for b in WIDTHS) for u in units}


def scores_of(units: list[Unit], seed: int = 0) -> UnitScores:
    rng, menu = random.Random(seed), menu_of(units)
    bases = {unit.name: 10 ** rng.uniform(-4, 0) for unit in units}
    return {u.name: {f.label: Score(bases[u.name] * 4.0**-f.bits, 0.0) for f in menu[u.name]} for u in units}


def test_permuted_scores_stay_among_units_of_equal_shape() -> None:
    units = make_units()
    scores = scores_of(units)
    permuted = permuted_scores(units, scores, 1)
    for kind in ("pair", "down"):
        names = [unit.name for unit in units if kind in unit.name]
        tables = [tuple(scores[n].items()) for n in names]
        assert Counter(tuple(permuted[n].items()) for n in names) == Counter(tables)
    assert permuted != scores and list(permuted) == [unit.name for unit in units]
    assert permuted == permuted_scores(units[::-1], scores, 1) != permuted_scores(units, scores, 2)
    assert permuted_scores(units[:2], scores, 1) == {unit.name: scores[unit.name] for unit in units[:2]}


def test_reversed_scores_turn_the_ranking_round_and_keep_more_bits_from_hurting() -> None:
    units = make_units()
    scores = scores_of(units)
    turned = reversed_scores(units, scores)

    def first(table: UnitScores, name: str) -> float:
        return next(iter(table[name].values())).value

    ranked = sorted(scores, key=lambda name: first(scores, name))
    assert [first(turned, name) for name in ranked] == [first(scores, name) for name in reversed(ranked)]
    for name, table in turned.items():
        assert table.keys() == scores[name].keys(), "labels are the unit's own, whatever its group size"
        values = [score.value for score in table.values()]
        assert values == sorted(values, reverse=True)
    assert reversed_scores(units, turned) == scores
    assert reversed_scores(units[::-1], scores) == turned
    menu = menu_of(units)
    budget = build_problem(units, menu, scores, {}).budget_bytes(4.0)
    worse = solve(build_problem(units, menu, turned, {}), budget).formats
    assert sum(scores[u][f.label].value for u, f in worse.items()) > (
        solve(build_problem(units, menu, scores, {}), budget).predicted_loss or 0.0
    )


def test_units_measured_at_other_widths_are_ranked_apart() -> None:
    units = make_units()
    scores = scores_of(units)
    scores["0.pair"]["w6g128"] = Score(0.5, 0.0)
    turned = reversed_scores(units, scores)
    assert turned["0.pair"] == scores["0.pair"] and permuted_scores(units, scores, 3)["0.pair"] == scores["0.pair"]
