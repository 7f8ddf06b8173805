"""Stages of a walk: their seconds add up to the time that passed, and inner ones take theirs from outer ones."""

from __future__ import annotations

import pytest
import torch

from hawqtool.runtime import stage_timer
from hawqtool.runtime.stage_timer import UNRECORDED, StageRecorder


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


def test_nothing_is_recorded_by_default() -> None:
    with UNRECORDED.stage("any"):
        pass
    assert not vars(UNRECORDED)
