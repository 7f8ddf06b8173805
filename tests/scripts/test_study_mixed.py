"""study_mixed.py on a tiny model: it judges what a run ships, beside uniform plans, and goes on where it was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.rows import evaluation_rows
from tests.support.runs import Run, random_text

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/research"
BUDGETS = (3.5, 5.0)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import study_mixed

    return study_mixed


def arguments(place: Path, out: Path) -> list[str]:
    (out.parent / "third.txt").write_text(random_text(3, 1000))
    texts = [f"--text=other={place / 'other.txt'}", f"--text=third={out.parent / 'third.txt'}", "--judge-rows=4"]
    keys = {"num_samples": 16, "seq_len": 32, "eval_samples": 4, "selection_samples": 8, "device": "cpu"}
    keys |= {"selection_data": str(place / "text.txt"), "proof": "layerwise", "swaps": 0}
    given = [f"--set={key}={value}" for key, value in keys.items()]
    return [str(place / "model"), str(out), "--calibration", str(place / "text.txt"), *texts, *given]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in out.read_text().splitlines()]


def test_a_study_judges_what_a_run_ships_and_does_only_what_is_missing(
    study: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    run: Run,
) -> None:  # fmt: skip
    out = tmp_path / "out.jsonl"
    call = [*arguments(place, out), "--budgets", "3.5,5", "--anchors", "w6ch"]
    assert study.main(call) == 0
    found = lines(out)
    for budget in BUDGETS:
        by_role = {line["role"]: line for line in found if line["budget"] == budget}
        assert {"shipped", "uniform"} <= set(by_role) == {"shipped", *by_role["shipped"]["beside"]}
        assert all(line["bpw"] <= budget for line in by_role.values())
        assert by_role["shipped"]["kind"] in ("mixed", "uniform")
        assert {name: len(text["rows"]) for name, text in by_role["shipped"]["texts"].items()} == {
            "other": 4,
            "third": 4,
        }
    assert {line["label"] for line in found if line["role"] == "anchor"} == {"w6ch"}

    mixed = next(line for line in found if line["role"] == "shipped" and line["kind"] == "mixed")
    folder, report = run(
        target_bpw=mixed["budget"], eval_data=place / "other.txt", eval_samples=4, proof="layerwise", swaps=0,
        group_size=None,
    )  # fmt: skip
    assert report["shipped"] == "mixed" and report["sizes"]["bpw_linears"] == pytest.approx(mixed["bpw"])
    job = prepare(study.load_config(None, {"model": str(place / "model"), "seq_len": 32, "device": "cpu"}))
    paths = {"other": place / "other.txt", "third": tmp_path / "third.txt"}
    rows = {name: evaluation_rows(job, str(path), 4) for name, path in paths.items()}
    for name, quality in Evaluator(RunContext(job), rows).evaluate(folder, "run").items():
        assert mixed["texts"][name]["rows"] == pytest.approx(quality.row_divergence, rel=1e-6)

    monkeypatch.setattr(study, "Draw", lambda *_: pytest.fail("carried out again"))
    assert study.main(call) == 0
    assert lines(out) == found
    assert study.main([*call, "--judge-rows", "5"]) == 2
    assert "other settings (judge_rows)" in capsys.readouterr().err
    assert study.main(["--table", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| model | 3.5 | 0 | `w3g32` | " in table and "Mean over the rows" in table


def test_the_curve_is_linear_in_bits_and_errors_are_paired(study: Any, tmp_path: Path) -> None:
    def line(role: str, budget: float | None, bpw: float, rows: list[float]) -> dict[str, Any]:
        kl = sum(rows) / len(rows)
        texts = {"a": {"kl": kl, "stderr": 0.0, "rows": rows}, "b": {"kl": kl, "stderr": 0.0, "rows": rows}}
        kind = "mixed" if role == "shipped" else role
        place = {"model": "m", "seed": 0, "budget": budget, "role": role, "label": role, "kind": kind, "bpw": bpw}
        return {**place, "texts": texts}

    written = [
        line("shipped", 3.0, 3.0, [0.9, 1.1]),
        line("uniform", 3.0, 2.0, [4.0, 4.0]),
        line("rule", 3.0, 3.0, [0.5, 0.5]),
        line("anchor", None, 4.0, [1.0, 1.0]),
        line("anchor", None, 2.5, [2.0, 2.0]),
    ]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written))
    (entry,) = study.mixed_tables.entries([tmp_path / "out.jsonl"])
    found = entry.differences()
    assert found["uniform"]["a"] == pytest.approx((-0.75, 0.1 / 4))
    assert found["curve"]["a"] == pytest.approx((-0.5, 0.1 / 2))  # half way between 4 and 1 is 2
    assert found["rule"]["b"] == pytest.approx((1.0, 0.2))
    assert entry.gain == pytest.approx(-0.5)
    table = study.mixed_tables.tables([tmp_path / "out.jsonl"])
    assert "| −75.0 ± 1.8 % | −50.0 ± 3.5 % | +100.0 ± 14.1 % |" in table
    assert "- 4 comparisons with uniform plans or the curve, 0 above zero" in table
    assert (
        "- 2 comparisons with the rule, 2 above zero beyond two standard errors: m at 3 bits, draw 0, a, rule" in table
    )
    curve = study.mixed_tables.curve(written[1], written[3], 3.0)["a"]
    assert torch.allclose(curve, torch.full((2,), 2.0, dtype=torch.float64))
