"""Phases, time left, and lines where nothing else is said."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hawqtool.cli import terminal as module
from hawqtool.cli.session import session
from hawqtool.cli.terminal import Course, Terminal
from hawqtool.pipeline import quantize as quantizing
from hawqtool.pipeline.load_trial import checks
from hawqtool.report.documents import Phase
from tests.support.runs import place, settings  # noqa: F401

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
    terminal.watch()
    terminal.expect(PHASES)
    terminal.progress("rounding the plan", 1, 4)
    deadline = time.monotonic() + 30
    said = ""
    while said.count("phase 2 of 5, rounding the plan: 1/4") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        said += capsys.readouterr().err
    terminal.end()
    assert said.count("left in all") >= 2 and "\x1b" not in said
    assert "rounding the plan: done in" in capsys.readouterr().err


def test_a_stage_that_is_over_is_not_told_again_where_there_are_no_phases(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PLAIN_SECONDS", 0.0)
    terminal = Terminal(quiet=False)
    terminal.progress("fingerprint of a model", 3, 4)
    terminal.beat()
    terminal.progress("fingerprint of a model", 4, 4)
    terminal.beat()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        *(f"fingerprint of a model: {done}/4" for done in (3, 3, 4)),
        "at work",
    ]


class Screen(io.StringIO):
    """Stands for stderr."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


SLOW = (
    "prepare", "estimate", "record_content", "gather_rows", "check_rotation", "make_planner", "choose", "build_report",
    "try_loading", "verify_folder", "seal", "write_page",
)  # fmt: skip
"""What a run calls between its walks through the model."""


@pytest.mark.parametrize("live", [False, True], ids=["file", "terminal"])
def test_no_part_of_a_run_is_silent(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    live: bool,
) -> None:
    screen, silent = Screen(live), list[str]()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(module, "_PLAIN_SECONDS", 0.05)

    def slow(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def until_something_is_said(*given: Any, **named: Any) -> Any:
            before, deadline = screen.tell(), time.monotonic() + 30
            while screen.tell() == before and time.monotonic() < deadline:
                time.sleep(0.01)
            if screen.tell() == before:
                silent.append(name)
            return None if name == "write_page" else work(*given, **named)

        return until_something_is_said

    for name in SLOW[0 if live else 2 :]:  # before the first screen a file is told nothing
        holder = checks if name in ("try_loading", "verify_folder") else quantizing
        monkeypatch.setattr(holder, name, slow(name, getattr(holder, name)))
    config = settings(place, bits="2,4", target_bpw=3.5, num_samples=8, seq_len=16, output=tmp_path / "out")
    with session() as terminal:
        announce = lambda found: (terminal.expect(found["estimate"]["phases"]), terminal.say("model"))  # noqa: E731
        quantizing.run_quantize(config, "hawqtool quantize", terminal, announce, estimates=True)
    assert not silent
    assert ("starting, " in screen.getvalue()) == live


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True, verbose=True)
    terminal.watch()
    terminal.progress("rounding", 1, 1)
    terminal.say("text")
    terminal.end()
    assert capsys.readouterr().err == ""
