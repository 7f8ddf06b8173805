"""Children end with their parent, however it dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from hawqtool.runtime import lifeline
from hawqtool.runtime.lifeline import Lifeline, watch_parent

PARENT = """
import os, subprocess, sys
from hawqtool.runtime.lifeline import Lifeline

watch = sys.argv[1]
child = f"import os, time; from hawqtool.runtime.lifeline import {watch}; {watch}(lambda: os._exit(7));"
child += "print('ready', flush=True); time.sleep(300)"
with Lifeline() as line:
    environment = os.environ | line.environment
    process = subprocess.Popen([sys.executable, "-c", child], env=environment, pass_fds=(line.descriptor,))
    process.wait()
"""


@pytest.mark.parametrize("watch", ["watch_parent", "watch_launcher"])
def test_a_child_ends_when_its_parent_is_killed(watch: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, watch], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.kill()
    # The child has the other end of this pipe: it is empty when the child is gone.
    assert parent.stdout.read() == ""
    assert parent.wait() < 0


@pytest.mark.parametrize("text", ["", "x", "1:2", "99999:1:1", "0:1:2"])
def test_what_is_no_pipe_of_the_parent_is_left_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lifeline.VARIABLE, text)
    before = threading.active_count()
    watch_parent(pytest.fail)
    assert threading.active_count() == before and lifeline.VARIABLE not in os.environ


def test_the_call_comes_when_the_other_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    with Lifeline() as line:
        kept = os.dup(line.descriptor)
        status = os.fstat(kept)
        monkeypatch.setenv(lifeline.VARIABLE, f"{kept}:{status.st_dev}:{status.st_ino}")
        watch_parent(ended.set)
        assert not ended.is_set()
    assert ended.wait(60)
    os.close(kept)
