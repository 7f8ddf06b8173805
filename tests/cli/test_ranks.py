"""``--gpus``: two processes on a CPU, by gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from hawqtool.cli.app import app
from hawqtool.export.manifest import file_hash
from tests.support.runs import place as place

SECONDS = 1200.0


def command(place: Path, output: Path, *more: str) -> list[str]:
    arguments = ["--bits", "3,4,8", "--target-bpw", "5", "--calibration", str(place / "text.txt"), "--gpus", "2"]
    arguments += ["--eval-data", str(place / "other.txt"), "--num-samples", "10", "--seq-len", "32"]
    arguments += ["--eval-samples", "8", "--group-size", "32", "--shortlist", "1", "--device", "cpu"]
    model = str(place / "model")
    return [sys.executable, "-m", "hawqtool", "quantize", model, "-o", str(output), *arguments, *more]


def ranks_of(launcher: int) -> dict[int, int]:
    """Process id by rank of a launcher's children."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next((int(e.removeprefix(b"RANK=")) for e in environment if e.startswith(b"RANK=")), None)
            if rank is not None:
                found[rank] = int(child)
    return found


def test_two_processes_give_one_file_also_after_one_was_killed(place: Path, tmp_path: Path) -> None:
    output, saved = tmp_path / "out", tmp_path / ".out.hawqtool" / "saved"
    with subprocess.Popen(command(place, output), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + SECONDS
        while not list(saved.glob("*block.0*")):  # while a plan is rounded
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(ranks_of(first.pid)[1], signal.SIGKILL)
        said = first.communicate(timeout=SECONDS)[1].splitlines()
    assert first.returncode == 1
    told = [line for line in said if line.startswith(("error", "terminated", "interrupted")) or "Traceback" in line]
    assert told == [
        "error: process 2 of 2 ended by signal 9, so that the others were ended too; finished work is kept, and the "
        "same command goes on with it"
    ]
    assert not output.exists() and list(saved.glob("*token-importance*"))
    hashes = []
    for folder in (output, tmp_path / "again"):
        done = subprocess.run(command(place, folder), capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        hashes.append(file_hash(folder / "model.safetensors"))
    assert hashes[0] == hashes[1]


def test_what_the_leader_refuses_is_said_once(place: Path, tmp_path: Path) -> None:
    asked = command(place, tmp_path / "out", "--pin", "nothing=4")
    done = subprocess.run(asked, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "nothing" in done.stderr


def test_a_gguf_file_is_evaluated_by_one_process(tmp_path: Path) -> None:
    (file := tmp_path / "model.gguf").write_bytes(b"GGUF")
    asked = ["evaluate", str(file), "--against", "m", "--eval-data", "t.txt", "--gpus", "2"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2 and "a GGUF file is evaluated in one process, found --gpus 2" in done.stderr
