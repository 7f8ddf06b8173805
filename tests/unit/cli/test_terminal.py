"""Phases, time left, and lines where nothing else is said."""

from __future__ import annotations

import time

import pytest

from hawqtool.cli import terminal as module
from hawqtool.cli.terminal import Course, Terminal
from hawqtool.report.documents import Phase

PHASES: list[Phase] = [
    {"name": "token importance", "seconds": 10.0},
    {"name": "round", "seconds": 20.0},
    {"name": "evaluating", "seconds": 10.0},
    {"name": "round", "seconds": 20.0},
    {"name": "checking", "seconds": 5.0},
]


def test_phases_are_found_by_their_beginning_and_left_time_follows_the_pace() -> None:
    course = Course(PHASES)
    assert course.label == "" and course.left(1, 0.5) is None
    course.enter("token importance", 0)
    assert course.label == "phase 1 of 5"
    # Half of 10 s took 10 s, beside a tenth of the 65 s that counts as having been on time.
    assert course.left(10, 0.5) == pytest.approx((10 + 6.5) / (5 + 6.5) * (5 + 55))
    course.enter("rounding plan kron", 20)
    assert course.label == "phase 2 of 5" and course.left(0, 0) == pytest.approx((20 + 6.5) / (10 + 6.5) * 55)
    course.enter("something unforeseen", 40)
    assert course.label == "phase 2 of 5"
    course.enter("checking the result", 0)  # plans that turned out alike are left out
    assert course.label == "phase 5 of 5" and course.left(5, 1) == pytest.approx(0)


def test_plain_lines_go_on_while_a_stage_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PLAIN_SECONDS", 0.02)
    terminal = Terminal(quiet=False, verbose=True)
    terminal.expect(PHASES)
    terminal.progress("rounding the plan", 1, 4)
    deadline = time.monotonic() + 30
    said = ""
    while said.count("phase 2 of 5, rounding the plan: 1/4") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        said += capsys.readouterr().err
    terminal.close()
    assert said.count("left in all") >= 2 and "\x1b" not in said
    assert "rounding the plan: done in" in capsys.readouterr().err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True, verbose=True)
    terminal.progress("rounding", 1, 1)
    terminal.say("text")
    terminal.close()
    assert capsys.readouterr().err == ""
