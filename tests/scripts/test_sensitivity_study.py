"""sensitivity_study.py on a tiny model: its files, that it goes on where it was cut, and its figures."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hawqtool.allocation.problem import stored_bytes
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import tiny_model

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/research"
METRICS = {"fisher", "kron", "projection", "hawq-ggn", "kl"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    generator = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("".join(generator.choices("abcdefgh ", k=1500)))
    tiny_model("qwen2", folder / "model", dtype=torch.float32)
    return folder


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import sensitivity_study

    return sensitivity_study


def arguments(place: Path, *more: object) -> list[str]:
    rows = ("--num-samples", 8, "--scoring-samples", 6, "--eval-samples", 5, "--seq-len", 16, "--device", "cpu")
    data = ("--calibration", place / "a.txt", "--eval-data", place / "b.txt", "--group-size", 32, "--bits", "2,4,8")
    return [str(value) for value in (place / "model", place / "out", *data, *rows, "--random-plans", 1, *more)]


def test_a_study_writes_its_findings_and_goes_on_where_it_was_cut(
    study: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "out"
    assert study.main(arguments(place, "--budgets", "4", "--swaps", "1")) == 0
    first = json.loads((out / "study.json").read_text())
    assert set(first["scores"]) == METRICS and set(first["agreement"]) == METRICS
    assert set(first["cost"]) == {"fisher + kron + projection + hawq-ggn", "kl", "forward + backward"}
    for found in first["agreement"].values():
        assert set(found) == {"2", "4", "8"}
        low, high = found["2"]["interval"]
        assert -1 <= low <= found["2"]["spearman"] <= high <= 1
    rows = list(csv.DictReader((out / "plans.csv").open()))
    assert {row["kind"] for row in rows} == {"metric", "width swap", "uniform", "random", "reversed", "rule"}
    assert {row["name"] for row in rows} >= METRICS
    assert len(list(csv.DictReader((out / "scores.csv").open()))) == 3 * len(first["truth"])
    assert {path.name for path in out.glob("*.png")} == {"scatter.png", "spearman.png", "plans.png"}
    assert "## Plans of equal bytes" in capsys.readouterr().out

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("study.scores.single_unit_scores", refuse)
    monkeypatch.setattr("study.scores.measure", refuse)
    (out / "study.json").write_text(json.dumps(first | {"plans": {}}))
    assert study.main(arguments(place, "--budgets", "4,5", "--parts", "scores,plans", "--swaps", "1")) == 0
    second = json.loads((out / "study.json").read_text())
    assert second["plans"]["4.0"] == first["plans"]["4.0"] and "5.0" in second["plans"]
    assert study.main(arguments(place, "--budgets", "4", "--parts", "plans", "--swaps", "2")) == 0
    third = json.loads((out / "study.json").read_text())
    assert third["plans"]["4.0"][:-1] == first["plans"]["4.0"] and third["plans"]["4.0"][-1]["name"] == "width swap 2"
    assert third["swapped"].keys() == {"4.0 1", "4.0 2", "5.0 1"}
    assert third["swapped"]["4.0 1"] == first["swapped"]["4.0 1"]
    capsys.readouterr()
    assert study.main(arguments(place, "--rounding", "rtn")) == 2
    assert "other settings (rounding, token_importance)" in capsys.readouterr().err


def test_plans_are_judged_as_their_written_folders_are(study: Any, place: Path, tmp_path: Path) -> None:
    from study.plans import Candidate, PlanEvaluator
    from study.setting import prepare_setting

    values = {"model": str(place / "model"), "calibration": str(place / "a.txt"), "eval_data": str(place / "b.txt")}
    more = {"num_samples": 8, "seq_len": 16, "eval_samples": 4, "group_size": 32, "device": "cpu"}
    setting = prepare_setting(values | more, (2, 8), 6, 16, Silent())
    job = setting.job
    formats = {name: found[number % 2] for number, (name, found) in enumerate(setting.menu.items())}
    judged = PlanEvaluator(setting, Silent()).evaluate(Candidate("mixed", "metric", formats))
    plan = BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))
    evaluator = Evaluator(RunContext(job), {"report": setting.heldout})
    with torch.no_grad():
        round_to_folder(RunContext(job), plan, setting.calibration, tmp_path / "plan", "plan")
        written = evaluator.evaluate(tmp_path / "plan", "plan")["report"]
    assert judged.row_divergence == pytest.approx(written.row_divergence, rel=1e-5)


def test_figures_of_agreement(study: Any) -> None:
    from study.scores import calibration, rank_agreement

    first, second = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])
    found = rank_agreement(first, second, seed=0)
    assert found["spearman"] == pytest.approx(0.8)
    assert found == rank_agreement(first, second, seed=0)
    assert rank_agreement(first, np.ones(4), seed=0)["spearman"] is None
    ratios = calibration(np.array([1.0, 4.0, -1.0]), np.array([1.0, 1.0, 1.0]))
    assert ratios["ratio"] == pytest.approx(2) and ratios["not_positive"] == 1


def test_the_uniform_curve_is_paired_by_rows(study: Any) -> None:
    from study.plans import plan_rows

    def evaluation(rows: list[float]) -> dict[str, Any]:
        empty = {"stderr": 0.0, "perplexity": None, "same_top": None, "cosine": None}
        return {"divergence": sum(rows) / len(rows), "row_divergence": rows, **empty}

    sizes = {"low": (100, [4.0, 12.0]), "high": (200, [1.0, 3.0]), "mixed": (150, [2.0, 6.0])}
    entries = [
        {"name": name, "kind": "metric" if name == "mixed" else "uniform", "stored_bytes": size, "evaluation": name}
        for name, (size, _) in sizes.items()
    ]
    findings = {"plans": {"3": entries}, "evaluations": {name: evaluation(rows) for name, (_, rows) in sizes.items()}}
    *_, mixed = plan_rows(findings)
    # Geometric mean of 8 and 2, in the rows' proportion of 1 to 3, which all three share.
    assert mixed["uniform"] == pytest.approx(4)
    assert mixed["minus_uniform"] == pytest.approx(0) and mixed["minus_uniform_stderr"] == pytest.approx(0)
