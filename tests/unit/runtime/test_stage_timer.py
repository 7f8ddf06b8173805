"""Stages of a walk: their seconds add up to the time that passed, and inner ones take theirs from outer ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hawqtool.runtime import stage_timer
from hawqtool.runtime.stage_timer import UNRECORDED, StageRecorder, Stopwatch, Timings
from hawqtool.runtime.store import NothingSaved


class Clock:
    """Stands still but for what is slept."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(stage_timer, "time", found)
    return found


def test_inner_stages_take_their_time_from_outer_ones(clock: Clock) -> None:
    recorder = StageRecorder(torch.device("cpu"))
    for _ in range(2):
        with recorder.stage("outer"):
            clock.sleep(1)
            with recorder.stage("inner"):
                clock.sleep(3)
            clock.sleep(2)
    clock.sleep(5)  # belongs to no stage
    assert recorder.seconds() == {"outer": 6, "inner": 6}
    assert list(recorder.seconds()) == ["outer", "inner"]


def test_a_stage_that_fails_ends(clock: Clock) -> None:
    recorder = StageRecorder(torch.device("cpu"))
    with pytest.raises(KeyError), recorder.stage("fails"):
        clock.sleep(1)
        raise KeyError
    clock.sleep(5)
    assert recorder.seconds() == {"fails": 1}


class Kept(NothingSaved):
    """Keeps one content."""

    content: Any = None

    def load(self, key: str) -> Any:
        return self.content

    def save(self, key: str, content: Any) -> None:
        self.content = content


def test_times_of_a_run_that_goes_on_are_those_of_all_its_starts(clock: Clock) -> None:
    kept = Kept()
    for error, seconds in ((KeyboardInterrupt, 3.0), (OSError, 5.0), (KeyboardInterrupt, 7.0), (KeyError, 0.5)):
        with pytest.raises(error), Stopwatch(Timings(kept), "measure"):
            clock.sleep(seconds)
            raise error
    assert kept.content == {"measure": 10.0}  # a disk that failed is not written to, nor is it for half a second
    timings = Timings(kept)
    with Stopwatch(timings, "rows"):
        clock.sleep(0.5)
    assert timings == {"measure": 10.0, "rows": 0.5} and kept.content == {"measure": 10.0}
    timings.save()
    assert kept.content == {"measure": 10.0, "rows": 0.5}


def test_nothing_is_recorded_by_default() -> None:
    with UNRECORDED.stage("any"):
        pass
    assert not vars(UNRECORDED)
