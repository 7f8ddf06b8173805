"""The phases of an estimate are those that a run goes through."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.cli.terminal import Course
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.search.estimate import estimate
from hawqtool.pipeline.search.rates import Rates
from hawqtool.runtime.reporter import Silent
from tests.support.runs import MIXED_TARGET, place, settings  # noqa: F401


class Noting(Silent):
    """Notes the stages of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage not in self.stages[-1:]:
            self.stages.append(stage)


def test_a_run_goes_through_the_phases_of_its_estimate(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hawqtool.pipeline.quantize.write_page", lambda *_: None)
    config = settings(place, bits="2,4,8", target_bpw=MIXED_TARGET, selection_data=(), output=tmp_path / "out")
    found, reporter = estimate(prepare(config)), Noting()
    run_quantize(config, "hawqtool quantize", reporter, lambda _: None)
    course, positions = Course(found["phases"]), []
    for stage in reporter.stages:
        course.enter(stage, 0)
        positions.append(course.position)
    # Every stage but those of further uniform plans is a phase of its own, in the order of the estimate.
    assert positions == sorted(positions) and positions[0] == 0 and positions[-1] == len(found["phases"]) - 1
    assert [phase["name"] for phase in found["phases"]][:5] == [
        "fingerprint",
        "sampling",
        "token importance",
        "forward sweep",
        "reverse sweep",
    ]
    assert len(set(positions)) >= 8


def test_seconds_follow_the_measured_rates(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    job, slow = prepare(settings(place, bits="4")), Rates(operations=1e30, rounded=100.0, read=1e30)
    monkeypatch.setattr("hawqtool.pipeline.search.estimate.measured_rates", lambda _: slow)
    seconds = {phase["name"]: phase["seconds"] for phase in estimate(job)["phases"]}
    assert seconds["round"] == pytest.approx(sum(unit.num_weights for unit in job.units) / 100)
    assert seconds["token importance"] == pytest.approx(0, abs=1e-9)


def test_what_is_left_out_takes_no_time(place: Path) -> None:  # noqa: F811
    bare = {"calibration": "self", "num_samples": None, "seq_len": None, "eval_samples": None}
    whole, plain = (
        estimate(prepare(settings(place, bits="4", **values))) for values in ({}, {"rounding": "rtn", **bare})
    )
    assert [phase["name"] for phase in plain["phases"]] == ["fingerprint", "round", "checking"]
    assert len(whole["phases"]) == 6
    assert plain["memory_bytes"] < whole["memory_bytes"] and plain["disk_bytes"] == whole["disk_bytes"] > 0
