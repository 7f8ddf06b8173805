"""Swaps by gradient: what is tried, what is taken, and how far the next round may go."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hawqtool.formats import QuantFormat
from hawqtool.pipeline.search import gradient_swap
from hawqtool.pipeline.search.gradient_swap import SHARES, Standing, _Search, next_share
from hawqtool.pipeline.search.width_swap import neighbouring
from hawqtool.records import LinearSpec, Score, Unit
from hawqtool.report.plan_comparison import SwapAttempt
from hawqtool.runtime.reporter import Silent
from hawqtool.sensitivity.plan_gradient import PlanChanges

W2, W3, W4 = (QuantFormat(bits, 32) for bits in (2, 3, 4))


def attempt(predicted: float, measured: float) -> SwapAttempt:
    values = {"round": 1, "share": 0.1, "moves": 2, "stored_bytes": 8, "predicted_stderr": 0.1, "measured_stderr": 0.1}
    return cast(SwapAttempt, {**values, "predicted": predicted, "measured": measured, "accepted": True})


def test_the_share_follows_how_well_the_last_change_was_predicted() -> None:
    assert next_share(0.1, attempt(-1.0, -0.9)) == pytest.approx(0.15)
    assert next_share(0.1, attempt(-1.0, -0.4)) == 0.1
    assert next_share(0.1, attempt(-1.0, -0.1)) == 0.05
    assert next_share(0.9, attempt(-1.0, -2.0)) == 1.0


def test_a_standing_comes_back_as_it_was_saved() -> None:
    standing = Standing({"a": W3}, 0.1, False, 2, (attempt(-1, 1),), {"a": {"w2g32": Score(0.5, 0.1)}})
    assert Standing.of_record(standing.record()) == standing


def test_farther_neighbours_have_the_widths_beside_the_present_one() -> None:
    formats = tuple(QuantFormat(bits, size) for bits in (2, 3, 4) for size in (None, 128, 64, 32))
    found = neighbouring({"a": formats, "b": formats}, {"a": QuantFormat(3, 64), "b": W3}, {"b"}, 2)
    assert [fmt.label for fmt in found["a"]] == ["w2g64", "w3ch", "w3g128", "w3g64", "w3g32", "w4ch", "w4g64"]
    assert found["b"] == (W3,)


def test_candidates_are_the_best_of_all_plans_within_their_share() -> None:
    """Enumerated: 3^6 plans, with and without a share that keeps some moves out."""
    units = tuple(Unit(f"u{i}", (LinearSpec(f"u{i}", 32 * (1 + i // 2), 64, i, f"u{i}", 2),)) for i in range(6))
    present, menu = {unit.name: W3 for unit in units}, {unit.name: (W2, W3, W4) for unit in units}
    draw = torch.rand(6, 2, generator=torch.Generator().manual_seed(3)).tolist()
    relative = {
        unit.name: {"w2g32": Score(0.5 * down, 0.01), "w3g32": Score(0.0, 0.0), "w4g32": Score(-up, 0.01)}
        for unit, (down, up) in zip(units, draw, strict=True)
    }
    total = sum(unit.stored_bytes(W3) for unit in units)
    job = SimpleNamespace(units=units, pins={})
    search = cast(Any, SimpleNamespace(context=SimpleNamespace(job=job), menu=menu, budget=total))
    share = 0.8
    found = _Search._within(search, present, relative, share, [present], 1.0)
    best = []
    for part in SHARES:
        allowed = []
        for formats in itertools.product((W2, W3, W4), repeat=6):
            sizes = [unit.stored_bytes(fmt) for unit, fmt in zip(units, formats, strict=True)]
            moved = sum(abs(size - unit.stored_bytes(W3)) for size, unit in zip(sizes, units, strict=True))
            if sum(sizes) <= total and moved <= part * share * total:
                scores = [relative[u.name][f.label] for u, f in zip(units, formats, strict=True)]
                allowed.append((sum(s.value + s.stderr for s in scores), formats))
        best.append(min(allowed, key=lambda entry: entry[0])[1])
    assert [tuple(plan.values()) for plan in found] == list(dict.fromkeys(best))
    assert len(found) >= 2
    assert _Search._within(search, present, relative, share, [present, *found], 1.0) == []


class _Judged(_Search):
    """A search over one unit, whose true divergences are given by its format."""

    def __init__(self, true: dict[QuantFormat, float]) -> None:
        unit = Unit("u", (LinearSpec("u", 32, 64, 0, "u", 2),))
        job = SimpleNamespace(units=(unit,), pins={}, config=SimpleNamespace(seed=0))
        self.context = cast(Any, SimpleNamespace(job=job, reporter=Silent()))
        self.menu, self.budget, self.true = {"u": (W2, W3, W4)}, unit.stored_bytes(W4), true
        self.rows, self.reference = cast(Any, SimpleNamespace(batch_size=1, scoring_batch=1)), cast(Any, None)
        self.selection = cast(Any, SimpleNamespace(sources=()))

    def spliced(self, formats: Any) -> Any:
        return None

    def divergence(self, formats: Any) -> torch.Tensor:
        noise = torch.linspace(-0.1, 0.1, 16, dtype=torch.float64) * (formats["u"] != W3)
        return self.true[formats["u"]] + noise


@pytest.mark.parametrize(("truth", "taken"), [(-0.5, True), (0.5, False), (-0.01, False)])
def test_only_the_true_divergence_takes_a_move(truth: float, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient promises 1 by 4 bits and a loss by 2; what the selection rows say decides."""
    rows = {fmt.label: torch.full((4,), value, dtype=torch.float64) for fmt, value in ((W2, 2.0), (W4, -1.0))}
    zeros = {label: torch.zeros(4, dtype=torch.float64) for label in rows}
    monkeypatch.setattr(gradient_swap, "plan_changes", lambda *_: PlanChanges({"u": rows}, {"u": zeros}))
    search = _Judged({W2: 5.0, W3: 1.0, W4: 1.0 + truth})
    found = search.round(Standing({"u": W3}, 0.1, False, 0, (), {}))
    (attempt,) = found.attempts  # a share of a tenth holds no move of the only unit, so it grows first
    assert (attempt["moves"], attempt["predicted"], attempt["accepted"]) == (1, pytest.approx(-1.0), taken)
    assert attempt["measured"] == pytest.approx(truth)
    assert found.formats == {"u": W4 if taken else W3}
    assert (found.rounds, found.ended) == (1, not taken)
