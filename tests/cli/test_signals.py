"""Signals that come where Python cannot raise end a command all the same."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal, time, weakref
from hawqtool.cli.session import session

class Thing:
    pass

with session():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.{name}))
    del thing
    time.sleep({seconds})
print("went on")
"""


def run(name: str, seconds: float) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(name=name, seconds=seconds)
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        # A test run in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(("name", "code", "said"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_signal_in_a_callback_is_not_lost(name: str, code: int, said: str) -> None:
    done = run(name, 30)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"{said}: nothing was left behind\n"


def test_a_command_that_ends_before_is_not_ended_by_it() -> None:
    done = run("SIGTERM", 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
