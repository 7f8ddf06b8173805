"""Signals that come where Python cannot raise end a command all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hawqtool.runtime.lifeline import Lifeline

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


HANGING = """
import signal, threading, time
from hawqtool.cli import signals
from hawqtool.cli.session import session

signals.END_SECONDS = 0.5
lock = threading.Lock()
lock.acquire()
with session():
    try:
        {before}
        signal.raise_signal(signal.SIGTERM)
    finally:
        {after}
"""
BEFORE = {
    "thread": "threading.Thread(target=time.sleep, args=(300,)).start()",
    "lock": "pass",
}
AFTER = {"thread": "pass", "lock": "lock.acquire()"}


def run(name: str, seconds: float) -> subprocess.CompletedProcess[str]:
    return run_program(PROGRAM.format(name=name, seconds=seconds))


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        # A test run in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("SIGTERM", 143, "terminated"), ("SIGHUP", 143, "terminated"), ("SIGINT", 130, "interrupted")],
)
def test_a_signal_in_a_callback_is_not_lost(name: str, code: int, said: str) -> None:
    done = run(name, 30)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"{said}: nothing was left behind\n"


def test_a_command_that_ends_before_is_not_ended_by_it() -> None:
    done = run("SIGTERM", 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize("hangs", ["lock", "thread"])
def test_what_hangs_after_a_signal_is_cut_off(hangs: str) -> None:
    done = run_program(HANGING.format(before=BEFORE[hangs], after=AFTER[hangs]))
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1].startswith("the command did not end by itself after a signal")


def test_a_command_ends_with_the_process_that_started_it() -> None:
    program = "import time\nfrom hawqtool.cli.session import session\nwith session():\n    time.sleep(300)"
    with Lifeline() as line:
        environment = os.environ | line.environment
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            pass_fds=(line.descriptor,),
            stderr=subprocess.PIPE,
            text=True,
        )
    # Closing it is what the system does when the process is killed.
    _, said = child.communicate(timeout=900)
    assert (child.returncode, said) == (143, "terminated: nothing was left behind\n")
