"""Stages of a walk: their seconds add up to the time that passed, and inner ones take theirs from outer ones."""

from __future__ import annotations

import time

import pytest
import torch

from hawqtool.runtime.stage_timer import UNRECORDED, StageRecorder


def test_inner_stages_take_their_time_from_outer_ones() -> None:
    recorder = StageRecorder(torch.device("cpu"))
    start = time.perf_counter()
    for _ in range(2):
        with recorder.stage("outer"):
            time.sleep(0.01)
            with recorder.stage("inner"):
                time.sleep(0.03)
            time.sleep(0.01)
    passed = time.perf_counter() - start
    time.sleep(0.05)  # belongs to no stage
    seconds = recorder.seconds()
    assert list(seconds) == ["outer", "inner"]
    assert seconds["outer"] >= 0.04 and seconds["inner"] >= 0.06
    assert sum(seconds.values()) == pytest.approx(passed, abs=0.01)


def test_a_stage_that_fails_ends() -> None:
    recorder = StageRecorder(torch.device("cpu"))
    with pytest.raises(KeyError), recorder.stage("fails"):
        raise KeyError
    time.sleep(0.05)
    assert recorder.seconds()["fails"] < 0.04


def test_nothing_is_recorded_by_default() -> None:
    with UNRECORDED.stage("any"):
        pass
    assert not vars(UNRECORDED)
