"""The choice of what is shipped: by the selection rows alone, with report rows that disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.search import selection
from hawqtool.pipeline.search.selection import Selection, _best, choose, compare, try_plans
from hawqtool.pipeline.search.shortlist import RULE
from hawqtool.pipeline.search.trials import Trial
from hawqtool.records import BitPlan, Evaluation, LinearSpec, Score, Unit
from hawqtool.report.wording import not_rounded_lines
from hawqtool.runtime.ranks import ALONE


def evaluation(rows: list[float], sources: tuple[str, ...] = ()) -> Evaluation:
    mean = sum(rows) / len(rows)
    return Evaluation(
        measure="kl",
        divergence=mean,
        stderr=0.0,
        row_divergence=tuple(rows),
        num_tokens=1,
        perplexity=1.0,
        same_top=1.0,
        sources=sources,
    )


def trial(name: str, chosen_by: list[float], reported: list[float]) -> Trial:
    plan = BitPlan({"u": QuantFormat(3, 32)}, 100, 100)
    rounding: Any = {"total_bytes": 1, "seconds": 0.0}
    return Trial(name, plan, Path(name), rounding, {"selection": evaluation(chosen_by), "report": evaluation(reported)})


@dataclass
class FakeJob:
    config: RunConfig
    units: tuple[Any, ...] = ()
    pins: dict[str, Any] = field(default_factory=dict)


LOW, HIGH = [1.0, 1.1, 0.9, 1.0], [2.0, 2.1, 1.9, 2.0]


@pytest.mark.parametrize(
    ("mixed", "uniform", "wanted"),
    [
        ((LOW, HIGH), (HIGH, LOW), "mixed"),
        ((HIGH, LOW), (LOW, HIGH), "uniform"),
        # Better, but not for sure: the differences are -1, 1, -1, 0.9.
        (([1.0, 2.0, 1.0, 2.0], LOW), ([2.0, 1.0, 2.0, 1.1], HIGH), "uniform"),
        # Better by a little on every row is better for sure, but another draw of calibration rows may take it back.
        (([0.92, 1.02, 0.82, 0.921], HIGH), (LOW, LOW), "uniform"),
        (([0.9, 1.0, 0.8, 0.901], HIGH), (LOW, LOW), "mixed"),
        ((LOW, LOW), (LOW, LOW), "uniform"),
    ],
)
def test_the_selection_rows_choose(monkeypatch: pytest.MonkeyPatch, mixed: Any, uniform: Any, wanted: str) -> None:
    monkeypatch.setattr(selection, "obeys", lambda *_: True)
    job: Any = FakeJob(RunConfig(model="m", target_bpw=4.0))
    tried = Selection({"kron": trial("kron", *mixed)}, trial("uniform", *uniform), "kron")
    assert choose(job, tried) == wanted


# Student's t, one-sided, three degrees of freedom, from tables: 2.353 at 5 %, 3.182 at 2.5 %, 4.541 at 1 %.
@pytest.mark.parametrize(
    ("tried", "errors", "wanted"),
    [(1, 2.30, "uniform"), (1, 2.40, "mixed"), (2, 3.15, "uniform"), (2, 3.20, "mixed"), (5, 4.50, "uniform")],
)
def test_students_t_and_the_number_of_plans_decide(
    monkeypatch: pytest.MonkeyPatch, tried: int, errors: float, wanted: str
) -> None:
    monkeypatch.setattr(selection, "obeys", lambda *_: True)
    # Differences of ±1 around their mean have a standard error of √(4 / 3) / √4 over four rows.
    # The draw of calibration rows adds 4 % of uniform's divergence, which is 1.
    stderr = math.hypot(3**-0.5, selection.DRAW_NOISE)
    mixed = [value + sign - errors * stderr for value, sign in zip(LOW, (1, -1, 1, -1), strict=True)]
    job: Any = FakeJob(RunConfig(model="m", target_bpw=4.0))
    others = {str(number): trial(str(number), HIGH, LOW) for number in range(1, tried)}
    found = Selection({"kron": trial("kron", mixed, HIGH)} | others, trial("uniform", LOW, LOW), "kron")
    assert choose(job, found) == wanted


BOTH = ("a", "a", "a", "b", "b", "b")


@pytest.mark.parametrize(
    ("differences", "wanted"),
    [
        ([-1.0, -1.1, -0.9, -1.0, -1.1, -0.9], "mixed"),
        # Better on average for sure, but text b is worse.
        ([-3.0, -3.1, -2.9, 0.2, 0.1, 0.3], "uniform"),
        # Worse on b by less than its standard error.
        ([-3.0, -3.1, -2.9, 0.1, -0.2, 0.2], "mixed"),
    ],
)
def test_no_source_may_lose(monkeypatch: pytest.MonkeyPatch, differences: list[float], wanted: str) -> None:
    monkeypatch.setattr(selection, "obeys", lambda *_: True)
    job: Any = FakeJob(RunConfig(model="m", target_bpw=4.0))
    uniform, mixed = trial("uniform", [5.0] * 6, LOW), trial("kron", [5 + d for d in differences], HIGH)
    for entry in (uniform, mixed):
        entry.quality["selection"] = evaluation([*entry.quality["selection"].row_divergence], BOTH)
    assert choose(job, Selection({"kron": mixed}, uniform, "kron")) == wanted


@pytest.mark.parametrize(("uniform", "wanted"), [((LOW, HIGH), "uniform"), ((HIGH, LOW), "mixed")])
def test_the_selection_rows_choose_under_a_quality_target(
    monkeypatch: pytest.MonkeyPatch, uniform: Any, wanted: str
) -> None:
    monkeypatch.setattr(selection, "obeys", lambda *_: True)
    job: Any = FakeJob(RunConfig(model="m", target_kl=1.5))
    tried = Selection({"kron": trial("kron", LOW, LOW)}, trial("uniform", *uniform), "kron")
    assert choose(job, tried) == wanted


def test_the_best_mixed_plan_is_that_of_the_selection_rows() -> None:
    tried = {"kron": trial("kron", HIGH, LOW), "fisher": trial("fisher", LOW, HIGH)}
    assert _best(tried) is tried["fisher"]


def test_each_source_of_selection_rows_counts_alike() -> None:
    """Of rows a, a, a, b the mean of all is 2.5 and 2, that of the sources 2 and 3."""
    many, one = trial("many", [3.0, 3.0, 3.0, 1.0], LOW), trial("one", [1.0, 1.0, 1.0, 5.0], LOW)
    for entry in (many, one):
        entry.quality["selection"] = evaluation([*entry.quality["selection"].row_divergence], ("a", "a", "a", "b"))
    assert (many.selection, one.selection) == (2.0, 3.0) and _best({"one": one, "many": many}) is many


def test_report_and_selection_rows_are_told_apart() -> None:
    """The comparison is of the report rows, beside what the choice saw."""
    tried = Selection({"kron": trial("kron", LOW, HIGH)}, trial("uniform", HIGH, LOW), "kron")
    found = compare(tried, evaluation(LOW), lambda _: {})
    assert found["mixed"]["kl"] == pytest.approx(2.0) and found["mixed"]["selection"]["kl"] == pytest.approx(1.0)
    assert found["mixed_minus_uniform"]["kl"] == pytest.approx(1.0)
    assert found["selection"]["mixed_minus_uniform"] == pytest.approx(-1.0)
    assert found["tried"]["kron"]["minus_uniform"]["report"]["kl"] == pytest.approx(1.0)


class FakeRunner:
    """Notes which plans are rounded."""

    def __init__(self, config: RunConfig, units: tuple[Unit, ...]) -> None:
        self.context = SimpleNamespace(job=FakeJob(config, units), ranks=ALONE)
        self.context.job.settings = SimpleNamespace(swaps=0, proof=config.proof)
        self.tried: list[str] = []

    def run_trial(self, name: str, plan: BitPlan) -> Trial:
        self.tried.append(name)
        return replace(trial(name, LOW, LOW), plan=plan)

    def keep_only(self, trials: list[Trial]) -> None:
        """All stay."""


@pytest.mark.parametrize(
    ("proof", "least", "tried"),
    [
        ("full", 1.0, ["kron", RULE, "uniform w3g32"]),
        ("predicted", 1.0, ["kron"]),
        ("predicted", 2.0, ["kron", RULE, "uniform w3g32"]),  # twice as much is not far above
    ],
)
def test_what_is_far_above_is_predicted_alone(proof: Any, least: float, tried: list[str]) -> None:
    units = tuple(Unit(f"u{i}", (LinearSpec(f"u{i}", 32, 64, i, f"u{i}", 2),)) for i in range(2))
    low, high = QuantFormat(2, 32), QuantFormat(4, 32)
    scores = {
        "u0": {"w2g32": Score(4.0, 0.1), "w3g32": Score(3.0, 0.1), "w4g32": Score(least, 0.1)},
        "u1": {"w2g32": Score(0.0, 0.1), "w3g32": Score(1.0, 0.1), "w4g32": Score(0.0, 0.1)},
    }
    size = units[0].stored_bytes(low) + units[0].stored_bytes(high)
    own, rule = (BitPlan({"u0": a, "u1": b}, size, 4096, budget_bytes=size) for a, b in ((high, low), (low, high)))
    runner: Any = FakeRunner(RunConfig(model="m", target_bpw=4.0, group_size=32, proof=proof), units)
    found = try_plans(runner, {"kron": own, RULE: rule}, scores)
    assert runner.tried == tried
    if "uniform w3g32" not in tried:
        ratios = {name: rival["ratio"] for name, rival in found.not_rounded.items()}
        assert ratios == pytest.approx({RULE: 4.0, "uniform w3g32": 4.0})
        comparison = compare(found, evaluation(LOW), lambda _: {})
        assert choose(runner.context.job, found) == "mixed" and comparison["uniform"] is None
        (line, other) = not_rounded_lines(comparison)
        assert "predicted, not measured" in line and "4.0 times" in other
