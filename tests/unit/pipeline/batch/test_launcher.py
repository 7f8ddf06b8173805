"""Command prefixes of a batch: how commands reach srun and ssh, and what is refused."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.pipeline.batch.jobs_file import Batch, BatchJob
from hawqtool.pipeline.batch.launcher import Launcher
from hawqtool.pipeline.batch.runner import _BatchRun, _failure
from hawqtool.runtime.reporter import Silent


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "is empty"), ("srun 'x", "cannot be read"), ("no-such-program --x", "names no-such-program")],
)
def test_prefixes_that_start_nothing_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Launcher.of(text)


def test_the_shell_behind_ssh_gets_the_words_and_the_folder_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a folder"
    here.mkdir()
    monkeypatch.chdir(here)
    wanted = ["print me", "it's", "$HOME", ""]
    code = "import os, sys; print([os.getcwd(), *sys.argv[1:]])"
    *prefix, text = Launcher(("/usr/bin/ssh", "-q", "host")).command([sys.executable, "-S", "-c", code, *wanted])
    assert prefix == ["/usr/bin/ssh", "-q", "host"]
    said = subprocess.run(["sh", "-c", text], cwd="/", capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([str(here), *wanted])


def test_every_job_is_started_by_the_prefix(tmp_path: Path) -> None:
    jobs = tuple(BatchJob(name, RunConfig(model="m", output=str(tmp_path / name), target_bpw=4)) for name in "ab")
    text = f"{shlex.quote(sys.executable)} --gpus 1 --"
    programs = _BatchRun(Batch(tmp_path, jobs), Silent(), Launcher.of(text)).prepare()
    assert [program.command[:3] for program in programs] == [(sys.executable, "--gpus", "1")] * 2
    assert all(program.command[4:7] == (sys.executable, "-m", "hawqtool") for program in programs)


def test_a_launcher_that_hides_a_failure_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("at work\nsrun: error: Node failure on second\nsrun: Job step aborted\n")
    code, said = _failure(0, log)
    assert code == 1 and said.startswith("ended with 0 but printed no report (srun: error: Node failure on second)")
