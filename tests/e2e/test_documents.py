"""What is written is what the types, and with them the page, say."""

from __future__ import annotations

from pathlib import Path

from hawqtool.pipeline.allocate import run_allocate, run_frontier
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.evaluate import run_evaluate
from hawqtool.pipeline.run.job import prepare
from hawqtool.report.documents import DryRun, EvaluationDocument, FrontierDocument, PlanDocument, SensitivityDocument
from hawqtool.report.schema import Report
from hawqtool.runtime.reporter import Silent
from tests.support.conformity import differences
from tests.support.runs import Report as Found
from tests.support.runs import Run, read, settings


def test_a_mixed_run(mixed: tuple[Path, Found]) -> None:
    folder, report = mixed
    assert differences(report, Report) == differences(read(folder / "report.json"), Report) == []
    assert differences(read(folder / "reproduce/plan.json"), PlanDocument) == []
    assert differences(read(folder / "reproduce/sensitivity.json"), SensitivityDocument) == []


def test_a_run_with_all_that_a_report_can_hold(run: Run, place: Path) -> None:
    learned, gates = {"refine_steps": 2, "distill_steps": 2}, {"max_kl": 1, "max_size": "1GB"}
    _, report = run(bits="3,4,8", target_kl=0.5, eval_data=place / "other.txt", **learned, **gates)
    assert report["search"] and report["refinement"] and report["distillation"] and len(report["gates"]) == 3
    assert differences(report, Report) == []


def test_other_documents(mixed: tuple[Path, Found], place: Path, sensitivity: Path, tmp_path: Path) -> None:
    config = settings(place, bits="2,3,4,8", target_bpw=5, eval_data=place / "other.txt")
    assert differences(describe(prepare(config)), DryRun) == []
    assert differences(run_allocate(config, sensitivity, tmp_path / "plan.json"), PlanDocument) == []
    open_config = settings(place, bits="2,3,4,8")
    for name in ("f.json", "f.csv"):
        assert differences(run_frontier(open_config, sensitivity, tmp_path / name, None), FrontierDocument) == []
    assert differences(run_evaluate(config, mixed[0], Silent()), EvaluationDocument) == []
