"""A negative score of the true Hessian is kept, named once, and recorded; one that is no number ends the work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import NumericalError
from hawqtool.pipeline.allocate import run_allocate
from hawqtool.pipeline.measure import run_measure
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.run.files import read_json, read_sensitivity, write_json
from hawqtool.pipeline.stages import measure as measuring
from hawqtool.pipeline.stages.measure import check_scores, score_warnings
from hawqtool.records import Score
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import tiny_model

SCORES = {"a": {"w4": Score(1.0, 0.1)}, "b": {"w4": Score(-2.0, 0.1)}, "c": {"w4": Score(-1.0, 0.1)}}
SETTINGS: dict[str, Any] = {"device": "cpu", "num_samples": 2, "seq_len": 16, "group_size": 32, "eval_samples": 2}


def test_the_warning_counts_units_and_names_the_first() -> None:
    (text,) = score_warnings({"hawq": SCORES})
    assert text.startswith("2 of 3 units have a negative hawq score (first b)") and "hawq-ggn" in text
    assert score_warnings({"hawq": {"a": SCORES["a"]}}) == () == score_warnings({"fisher": SCORES})


def test_scores_that_overflow_are_a_numerical_failure_not_a_damaged_file() -> None:
    check_scores({"fisher": SCORES | {"d": {"w4": Score(1.0, math.nan)}}}, {"a": {"w4": [1.0, -2.0]}})
    for bad in (Score(math.inf, 0.1), Score(math.nan, 0.1), Score(1.0, math.inf)):
        with pytest.raises(NumericalError, match=r"the score fisher of d in w4 is not finite; .*; give other"):
            check_scores({"fisher": SCORES | {"d": {"w4": bad}}}, {})
    with pytest.raises(NumericalError, match="projection of a is not finite"):
        check_scores({}, {"a": {"w4": [1.0, math.inf]}})


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose second and later units are given traces below zero."""

    def negative(context: Any, _rows: Any, norms: Any, *_: Any) -> Any:
        scores = {
            unit.name: {label: Score(float(1 - 2 * bool(place)), 0.1) for label in norms[unit.members[0].name]}
            for place, unit in enumerate(context.job.units)
        }
        return {"hawq": scores}, {unit.name: {} for unit in context.job.units}, {}

    monkeypatch.setattr(measuring, "measure_curvature", negative)
    return tiny_model("llama", tmp_path / "model")


def test_measuring_keeps_the_score_and_records_one_warning(model: Path, tmp_path: Path) -> None:
    reporter, output = Silent(), tmp_path / "sensitivity.json"
    config = RunConfig(model=str(model), bits="4,8", extra_metrics="hawq", **SETTINGS)  # type: ignore[arg-type]
    document = run_measure(config, output, reporter)
    second = list(document["units"])[1]
    assert document["warnings"] == reporter.warnings and len(reporter.warnings) == 1
    assert f"first {second}" in reporter.warnings[0]
    assert all(value == -1 for value, _ in document["scores"]["hawq"][second].values())
    assert read_sensitivity(output)[0].warnings == tuple(reporter.warnings)
    older = read_json(output, document["schema"])
    del older["warnings"]  # files of earlier versions
    write_json(output, older)
    assert read_sensitivity(output)[0].warnings == ()
    again = Silent()
    for metric, count in (("hawq", 1), ("hawq-ggn", 0)):
        wanted = RunConfig(model=str(output), target_bpw=6, sensitivity=metric, bits="4,8", group_size=32)  # type: ignore[arg-type]
        run_allocate(wanted, output, tmp_path / "plan.json", again)
        assert len(again.warnings) == count
        again.warnings.clear()


def test_the_report_records_it(model: Path, tmp_path: Path) -> None:
    config = RunConfig(
        model=str(model), output=str(tmp_path / "out"), bits="4,8", target_bpw=6.5, sensitivity="hawq", **SETTINGS
    )  # type: ignore[arg-type]
    report = run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)
    assert sum("negative hawq score" in text for text in report["warnings"]) == 1
