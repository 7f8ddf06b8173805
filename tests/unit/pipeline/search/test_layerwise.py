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
from hawqtool.pipeline.search.layerwise import some_rows
from hawqtool.pipeline.search.selection import choose, compare, try_plans
from hawqtool.pipeline.search.shortlist import RULE
from hawqtool.pipeline.search.trials import Trial
from hawqtool.records import BitPlan, Evaluation, LinearSpec, Rows, Score, Unit
from hawqtool.report.wording import not_rounded_lines
from hawqtool.runtime.store import NOTHING_SAVED

UNITS = tuple(Unit(f"u{i}", (LinearSpec(f"u{i}", 32, 64, i, f"u{i}", 2),)) for i in range(2))
SMALL, LARGE = QuantFormat(2, 32), QuantFormat(4, 32)
SIZE = UNITS[0].stored_bytes(SMALL) + UNITS[0].stored_bytes(LARGE)
OWN, RIVAL = (BitPlan({"u0": a, "u1": b}, SIZE, 4096, budget_bytes=SIZE) for a, b in ((LARGE, SMALL), (SMALL, LARGE)))


def evaluation(rows: list[float]) -> Evaluation:
    return Evaluation("kl", sum(rows) / len(rows), 0.0, tuple(rows), 1)


class FakeRunner:
    """Knows the divergence of every plan beforehand, and notes which are carried out."""

    def __init__(self, divergence: dict[str, list[float]]) -> None:
        config = RunConfig(model="m", target_bpw=4.0, group_size=32, proof="layerwise")
        job = SimpleNamespace(
            config=config, units=UNITS, pins={}, settings=SimpleNamespace(swaps=0, proof=config.proof)
        )
        self.context = SimpleNamespace(job=job, saved=NOTHING_SAVED)
        self.evaluator = SimpleNamespace(
            compare_layerwise=lambda _, plans: {name: evaluation(divergence[name]) for name in plans}
        )
        rows = Rows(torch.zeros(4, 8, dtype=torch.int64), "test", "-")
        self.sets, self.timings, self.tried = {"calibration": rows}, dict[str, float](), list[tuple[str, Any]]()

    def run_trial(self, name: str, plan: BitPlan, roles: Any) -> Trial:
        self.tried.append((name, roles))
        rounding: Any = {"total_bytes": 1, "seconds": 0.0}
        return Trial(name, plan, Path(name), rounding, {"report": evaluation([1.0, 1.1])})


LOW, MIDDLE, HIGH = [1.0, 1.1, 0.9, 1.0], [1.5, 1.6, 1.4, 1.45], [2.0, 2.1, 1.9, 2.0]


@pytest.mark.parametrize(
    ("own", "rule", "uniform", "obeyed", "wanted"),
    [
        (LOW, MIDDLE, HIGH, True, "kron"),
        (MIDDLE, LOW, HIGH, True, RULE),
        (MIDDLE, HIGH, LOW, True, "uniform w3g32"),
        ([0.9, 1.2, 0.8, 1.0], HIGH, LOW, True, "uniform w3g32"),  # better, but not for sure
        (MIDDLE, HIGH, LOW, False, "kron"),  # uniform is not what was asked for
    ],
)
def test_the_best_is_carried_out_alone(
    monkeypatch: pytest.MonkeyPatch, own: Any, rule: Any, uniform: Any, obeyed: bool, wanted: str
) -> None:
    monkeypatch.setattr(selection, "obeys", lambda *_: obeyed)
    divergence = {"kron": own, RULE: rule, "uniform w3g32": uniform}
    runner: Any = FakeRunner(divergence)
    found = try_plans(runner, {"kron": OWN, RULE: RIVAL}, {"u0": {"w2g32": Score(1.0, 0.1)}})
    assert runner.tried == [(wanted, ("report",))]
    assert choose(runner.context.job, found) == ("uniform" if wanted.startswith("uniform") else "mixed")
    record = compare(found, evaluation(LOW), lambda _: {})
    assert record["selection"]["plans"] == 2
    rivals, mean = record["not_rounded"], {name: sum(rows) / len(rows) for name, rows in divergence.items()}
    assert set(rivals) == set(divergence) - {wanted}
    for name, rival in rivals.items():
        assert rival["minus_shipped"]["difference"] == pytest.approx(mean[name] - mean[wanted])
    assert all("rounded one by one" in line for line in not_rounded_lines(record))


def test_rows_of_a_comparison_keep_their_importance() -> None:
    tokens = torch.arange(128)[:, None].expand(128, 4)
    rows = Rows(tokens, "test", "-", {"a": tokens.float()})
    found = some_rows(rows)
    assert len(found.tokens) == 32 and found.importance is not None
    assert torch.equal(found.importance["a"], found.tokens.float())
    assert len(some_rows(Rows(tokens[:40], "test", "-")).tokens) == 40
