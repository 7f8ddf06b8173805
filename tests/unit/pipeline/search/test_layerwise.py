"""What a layerwise comparison chooses, and that nothing else is carried out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.search import selection
from hawqtool.pipeline.search.selection import choose, compare, try_plans
from hawqtool.pipeline.search.shortlist import RULE
from hawqtool.pipeline.search.trials import JUDGED, Trial, formats_key
from hawqtool.records import BitPlan, Evaluation, LinearSpec, Rows, Score, Unit
from hawqtool.report.wording import not_rounded_lines
from hawqtool.runtime.stage_timer import Timings
from hawqtool.runtime.store import NOTHING_SAVED

UNITS = tuple(Unit(f"u{i}", (LinearSpec(f"u{i}", 32, 64, i, f"u{i}", 2),)) for i in range(2))
SMALL, LARGE = QuantFormat(2, 32), QuantFormat(4, 32)
SIZE = UNITS[0].stored_bytes(SMALL) + UNITS[0].stored_bytes(LARGE)
OWN, RIVAL = (BitPlan({"u0": a, "u1": b}, SIZE, 4096, budget_bytes=SIZE) for a, b in ((LARGE, SMALL), (SMALL, LARGE)))


def evaluation(rows: list[float]) -> Evaluation:
    return Evaluation("kl", sum(rows) / len(rows), 0.0, tuple(rows), 1)


class FakeRunner:
    """Knows what every plan is, layerwise and carried out, and notes which are carried out."""

    def __init__(self, divergence: dict[str, list[float]], real: dict[str, list[float]]) -> None:
        self.real = real
        config = RunConfig(model="m", target_bpw=4.0, group_size=32, proof="layerwise")
        job = SimpleNamespace(
            config=config,
            device=torch.device("cpu"),
            units=UNITS,
            pins={},
            settings=SimpleNamespace(swaps=0, proof=config.proof),
        )
        self.context = SimpleNamespace(job=job, saved=NOTHING_SAVED)
        self.evaluator = SimpleNamespace(
            compare_layerwise=lambda _, plans: {name: evaluation(divergence[name]) for name in plans}
        )
        rows = Rows(torch.zeros(4, 8, dtype=torch.int64), "test", "-")
        self.certain = ""
        self.sets, self.timings, self.tried = {"calibration": rows}, Timings(NOTHING_SAVED), list[tuple[str, Any]]()

    def run_trial(self, name: str, plan: BitPlan, roles: Any = JUDGED) -> Trial:
        self.tried.append((name, roles))
        rounding: Any = {"total_bytes": 1, "seconds": 0.0}
        rows = {"report": [1.0, 1.1], "selection": self.real[name]}
        return Trial(name, plan, Path(name), rounding, {role: evaluation(rows[role]) for role in roles})


LOW, MIDDLE, HIGH = [1.0, 1.1, 0.9, 1.0], [1.5, 1.6, 1.4, 1.45], [2.0, 2.1, 1.9, 2.0]


UNSURE = [0.9, 1.2, 0.8, 1.0]
UNIFORM = "uniform w3g32"


@pytest.mark.parametrize(
    ("own", "rule", "uniform", "obeyed", "carried_out"),
    [
        (LOW, MIDDLE, HIGH, True, ["kron"]),
        (MIDDLE, LOW, HIGH, True, [RULE]),
        (MIDDLE, HIGH, LOW, True, ["kron", UNIFORM]),
        (UNSURE, HIGH, LOW, True, ["kron", UNIFORM]),  # better, but not for sure
        (MIDDLE, HIGH, LOW, False, ["kron"]),  # uniform is not what was asked for
    ],
)
@pytest.mark.parametrize("wins", [True, False])
def test_what_is_better_for_sure_is_carried_out_alone(
    monkeypatch: pytest.MonkeyPatch, own: Any, rule: Any, uniform: Any, obeyed: bool, carried_out: list[str], wins: bool
) -> None:
    monkeypatch.setattr(selection, "obeys", lambda *_: obeyed)
    divergence, best = {"kron": own, RULE: rule, UNIFORM: uniform}, carried_out[0]
    real = {best: LOW if wins else HIGH, UNIFORM: MIDDLE}  # which counts where uniform is carried out too
    runner: Any = FakeRunner(divergence, real)
    found = try_plans(runner, {"kron": OWN, RULE: RIVAL}, {"u0": {"w2g32": Score(1.0, 0.1)}})
    both = len(carried_out) == 2
    assert runner.tried == [(name, JUDGED if both else ("report",)) for name in carried_out]
    # Only what is shipped whatever comes of it is checked beside its evaluation.
    assert runner.certain == ("" if both else formats_key({"kron": OWN, RULE: RIVAL}[best].formats))
    shipped = UNIFORM if both and not wins else best
    assert choose(runner.context.job, found) == ("uniform" if shipped == UNIFORM else "mixed")
    record = compare(found, evaluation(LOW), lambda _: {})
    mean = {name: sum(rows) / len(rows) for name, rows in divergence.items()}
    told = record["selection"]["mixed_minus_uniform"]
    assert told == pytest.approx((-0.4875 if wins else 0.5125) if both else mean[best] - mean[UNIFORM])
    assert record["selection"]["plans"] == 2
    rivals = record["not_rounded"]
    assert set(rivals) == set(divergence) - set(carried_out)
    for name, rival in rivals.items():
        assert rival["minus_shipped"]["difference"] == pytest.approx(mean[name] - mean[shipped])
    assert all("rounded one by one" in line for line in not_rounded_lines(record))


FAR = [1.3, 1.4, 1.2, 1.3]


@pytest.mark.parametrize(("own", "best"), [([0.8] * 4, "kron"), ([2.0] * 4, RULE)])
@pytest.mark.parametrize("uniform", [HIGH, FAR])
def test_far_plans_do_not_displace_the_metrics_own(
    monkeypatch: pytest.MonkeyPatch, own: list[float], best: str, uniform: list[float]
) -> None:
    monkeypatch.setattr(selection, "obeys", lambda *_: True)
    sure = uniform is HIGH
    runner: Any = FakeRunner({"kron": MIDDLE, RULE: FAR, UNIFORM: uniform}, {"kron": own, RULE: LOW, UNIFORM: HIGH})
    found = try_plans(runner, {"kron": OWN, RULE: RIVAL}, {"u0": {"w2g32": Score(1.0, 0.1)}})
    assert runner.tried == [(name, JUDGED) for name in (RULE, "kron", *([] if sure else [UNIFORM]))]
    assert found.best == best and choose(runner.context.job, found) == "mixed" and runner.certain == ""
    record = compare(found, evaluation(LOW), lambda _: {})
    assert set(record.get("not_rounded", {})) == ({UNIFORM} if sure else set())
    if sure:  # of the plan that is shipped, though the comparison liked the other one better
        layerwise = {"kron": 1.4875, RULE: 1.3}[best]
        assert record["selection"]["mixed_minus_uniform"] == pytest.approx(layerwise - 2.0)
