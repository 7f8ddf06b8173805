"""Gates of ``quantize``: exit code, streams, JUnit report, annotations, and the comparison with an earlier report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from hawqtool.cli.app import app
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind

SMALL = (
    *("--num-samples", "8", "--seq-len", "16", "--group-size", "32", "--device", "cpu"),
    *("--eval-samples", "4", "--selection-samples", "8"),
)
TARGET = ("--bits", "4", "--target-bpw", "4.5")
PASSED = ("--max-kl", "10", "--max-ppl-increase", "900%", "--min-same-top", "0", "--max-fallbacks", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    (folder / "text.txt").write_text(random_text(1, 2000))
    tiny_llama(folder / "model")
    return folder


def quantize(place: Path, output: Path, *options: object) -> Result:
    arguments = ("quantize", place / "model", "-o", output, "--calibration", place / "text.txt", *SMALL, *options)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def baseline(place: Path) -> Path:
    """Report of a run that nobody may change."""
    result = quantize(place, place / "first", *TARGET)
    assert result.exit_code == 0, result.stderr
    return place / "first/report.json"


def cases(path: Path) -> dict[str, list[str]]:
    """Test case to the tags in it."""
    return {str(case.get("name")): [child.tag for child in case] for case in ElementTree.parse(path).getroot()}


def test_gates_that_pass_are_in_every_place(place: Path, tmp_path: Path) -> None:
    output, junit = tmp_path / "out", tmp_path / "junit.xml"
    result = quantize(place, output, *TARGET, *PASSED, "--max-size", "1MB", "--junit", junit)
    assert result.exit_code == 0, result.stderr
    report = json.loads((output / "report.json").read_text())
    names = ["max_kl", "max_ppl_increase", "min_same_top", "max_size", "max_fallbacks"]
    assert [gate["name"] for gate in report["gates"]] == names
    found = {gate["name"]: gate["found"] for gate in report["gates"]}
    evaluation = report["evaluation"]
    shipped = evaluation[report["shipped"]]
    assert found["max_kl"] == shipped["kl"] and found["min_same_top"] == shipped["same_top"]
    assert found["max_ppl_increase"] == shipped["perplexity"] / evaluation["original"]["perplexity"] - 1
    assert found["max_size"] == (output / "model.safetensors").stat().st_size
    assert cases(junit) == {f"quantize {place / 'model'}": []} | {name: [] for name in names}
    assert "5 of 5 passed" in result.stderr
    for text in (result.stdout, (output / "README.md").read_text()):
        assert all(name in text for name in names)


def test_failed_gates_exit_3_and_keep_what_was_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    output, junit = tmp_path / "out", tmp_path / "junit.xml"
    options = ("--max-kl", "1e-9", "--min-same-top", "100%", "--max-fallbacks", "0", "--json", "--quiet")
    result = quantize(place, output, *TARGET, *options, "--junit", junit)
    assert result.exit_code == 3
    report = json.loads(result.stdout)
    assert report == json.loads((output / "report.json").read_text())
    assert {gate["name"]: gate["passed"] for gate in report["gates"]} == {
        "max_kl": False,
        "min_same_top": False,
        "max_fallbacks": True,
    }
    assert load_file(output / "model.safetensors")
    error, *annotations = result.stderr.splitlines()
    assert error.startswith("error: 2 of 3 gates failed: max_kl at most 1e-09, found ")
    assert "min_same_top at least 100 %" in error and "raise the target" in error
    assert len(annotations) == 2
    assert annotations[0].startswith("::error title=hawqtool exit code 3::max_kl at most 1e-09, found ")
    assert annotations[1].startswith("::error title=hawqtool exit code 3::min_same_top at least 100 %25, found ")
    assert [name for name, tags in cases(junit).items() if tags == ["failure"]] == ["max_kl", "min_same_top"]


def test_gates_combine_with_a_quality_target(place: Path, tmp_path: Path) -> None:
    result = quantize(place, tmp_path / "out", "--bits", "3", "--target-kl", "1e-9", "--max-kl", "10", "--json")
    assert result.exit_code == 3
    assert {g["name"]: g["passed"] for g in json.loads(result.stdout)["gates"]} == {"target_kl": False, "max_kl": True}
    assert "add wider --bits" in result.stderr


def test_the_same_run_is_no_regression_and_a_worse_one_is(place: Path, tmp_path: Path, baseline: Path) -> None:
    compared = ("--baseline", baseline, "--max-regression", "0%", "--json")
    same = quantize(place, tmp_path / "same", *TARGET, *compared)
    assert same.exit_code == 0, same.stderr
    gates = json.loads(same.stdout)["gates"]
    assert [gate["name"] for gate in gates] == ["regression_divergence", "regression_size", "regression_perplexity"]
    assert all(gate["found"] == gate["limit"] == gate["baseline"] for gate in gates)
    reproduced = (tmp_path / "same/reproduce/config.yaml").read_text()
    assert "baseline" not in reproduced and "max_regression" not in reproduced
    worse = quantize(place, tmp_path / "worse", "--bits", "3", "--target-bpw", "3.5", *compared)
    assert worse.exit_code == 3
    passed = {gate["name"]: gate["passed"] for gate in json.loads(worse.stdout)["gates"]}
    assert not passed["regression_divergence"] and passed["regression_size"]


def other_kind(report: dict[str, Any]) -> None:
    report["evaluation"]["measure"] = "embedding_error"
    report["evaluation"][report["shipped"]]["embedding_error"] = 0.1


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another schema": (lambda r: r.update(schema="hawqtool.plan/1"), "expected 'hawqtool.report/2'"),
    "no evaluation": (lambda r: r.pop("evaluation"), "is damaged"),
    "another kind of model": (other_kind, "its measure is embedding_error"),
    "other rows": (lambda r: r["rows"]["report"].update(fingerprint="ab" * 32), "other report rows: fingerprint abab"),
}


@pytest.mark.parametrize("case", sorted(SPOILT))
def test_a_baseline_that_cannot_be_compared_exits_2(place: Path, tmp_path: Path, baseline: Path, case: str) -> None:
    change, said = SPOILT[case]
    report = json.loads(baseline.read_text())
    change(report)
    (tmp_path / "old.json").write_text(json.dumps(report))
    options = ("--baseline", tmp_path / "old.json", "--max-regression", "5%", "--quiet")
    result = quantize(place, tmp_path / "out", *TARGET, *options)
    assert result.exit_code == 2, result.stderr
    assert said in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_other_report_rows_are_noticed(place: Path, tmp_path: Path, baseline: Path) -> None:
    options = ("--baseline", baseline, "--max-regression", "5%", "--seed", "1", "--quiet")
    result = quantize(place, tmp_path / "out", *TARGET, *options)
    assert result.exit_code == 2 and "other report rows" in result.stderr


def test_a_gate_that_a_model_cannot_be_judged_by_exits_2(place: Path, tmp_path: Path) -> None:
    model = save_kind(kind_named("bert"), tmp_path / "model")
    arguments = (
        "quantize",
        model,
        "--target-bpw",
        "9",
        "--calibration",
        place / "text.txt",
        "--dry-run",
        "--num-samples",
        "8",
        "--seq-len",
        "16",
        "--max-kl",
        "1",
    )
    for options, said in (
        ((), None),
        (("--max-ppl-increase", "5%"), "has no perplexity"),
        (("--min-same-top", "90%"), "has no likeliest token or class"),
    ):
        result = CliRunner().invoke(app, [str(a) for a in (*arguments, *options)])
        assert result.exit_code == (2 if said else 0), result.stderr
        assert said is None or said in result.stderr


@pytest.mark.parametrize("github", ["true", ""])
def test_a_failure_is_a_document_a_test_case_and_an_annotation(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, github: str
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", github)
    arguments = ("quantize", tmp_path / "nowhere", "-o", tmp_path / "out", *TARGET, "--json")
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, "--junit", tmp_path / "junit.xml")])
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["schema"] == "hawqtool.error/1" and document["exit_code"] == 4
    lines = result.stderr.splitlines()
    assert lines[0] == f"error: {document['error']}"
    assert [line[:40] for line in lines[1:]] == ["::error title=hawqtool exit code 4::" + document["error"][:4]] * bool(
        github
    )
    assert cases(tmp_path / "junit.xml") == {f"quantize {tmp_path / 'nowhere'}": ["error"]}


def test_a_junit_file_that_cannot_be_made_exits_2(place: Path, tmp_path: Path) -> None:
    result = quantize(place, tmp_path / "out", *TARGET, "--junit", tmp_path / "none/junit.xml")
    assert result.exit_code == 2 and "does not exist" in result.stderr
    assert list(tmp_path.iterdir()) == []
