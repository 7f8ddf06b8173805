"""``hawqtool batch`` as a user runs it: what fails hurts nothing else, what is there is left alone."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from hawqtool.checkpoint.index import read_index
from hawqtool.cli.app import app
from hawqtool.pipeline.batch.jobs_file import read_batch
from hawqtool.pipeline.batch.runner import _BatchRun, job_state
from hawqtool.pipeline.batch.summary import batch_code, front
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import tiny_llama

GOOD = ("model-4.0bpw", "model-6.0bpw")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=2000)))
    tiny_llama(folder / "model")
    return folder


def write(place: Path, **defaults: Any) -> Path:
    settings = {
        "group_size": 32,
        "num_samples": 8,
        "seq_len": 16,
        "eval_samples": 4,
        "device": "cpu",
        "rounding": "rtn",
    }
    document = {
        "output": str(place / "runs"),
        "defaults": {"calibration": str(place / "text.txt"), **settings, **defaults},
        "matrix": {"model": [str(place / "model")], "target_bpw": [4.0, 6.0]},
        "jobs": [{"name": "absent", "model": str(place / "absent"), "target_bpw": 4.0}],
    }
    path = place / "jobs.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def changes(place: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in place.glob("runs/*/report.json")}


def states(path: Path, overwrite: bool = False) -> list[str]:
    return [job_state(job, Silent()).name for job in read_batch(path, None, None, overwrite).jobs]


def test_a_batch_its_rerun_and_changed_settings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    path, runs = write(place), place / "runs"
    found = invoke(path, "--dry-run", "--json")
    rows = json.loads(found.stdout)["jobs"]
    assert [row["status"] for row in rows] == ["would fail", "to do", "to do"]
    assert found.exit_code == 4 and not runs.exists()

    found = invoke(path, "--json", "--jobs", 2)
    summary = json.loads(found.stdout)
    assert summary == json.loads((runs / "summary.json").read_text()) and summary["schema"] == "hawqtool.batch/1"
    assert found.exit_code == summary["exit_code"] == 4
    assert [(row["name"], row["exit_code"], row["ran"]) for row in summary["jobs"]] == [
        ("absent", 4, True),
        *((name, 0, True) for name in GOOD),
    ]
    # The second job of the model waits for the first one's measurement, or comes after it.
    assert {row["device"] for row in summary["jobs"]} == {"2", "5"}
    assert sorted(row["measurement"] for row in summary["jobs"][1:]) == ["run", "shared"]
    assert summary["measured"] == 1 and len(list((runs / "measurements").iterdir())) == 1
    assert "is not a folder" in summary["jobs"][0]["error"]
    # On a slow machine jobs say in between where they are.
    said = [line.split(":")[0].split()[0] for line in found.stderr.splitlines() if line.startswith("[")]
    assert said == [f"[{n}/3]" for n in range(1, 4)]
    assert [row["name"] for row in csv.DictReader((runs / "summary.csv").open())] == [
        row["name"] for row in summary["jobs"]
    ]
    assert summary["models"][0]["pareto"] == list(GOOD) and (runs / "pareto-model.png").is_file()
    before = changes(place)

    found = invoke(path)
    assert found.exit_code == 4 and changes(place) == before
    assert found.stderr.count("already there") == 2 and "1 run now, 0 measurements made" in found.stdout

    # A result is there when all its files are as they were written, and its model is.
    weights = runs / GOOD[0] / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        assert states(path) == ["to do", "damaged", "done"] and states(path, True) == ["to do", "to do", "done"]
    weights.write_bytes(whole)
    original = place / "model/model.safetensors"
    norm = read_index(original.parent).tensors["model.norm.weight"]
    content = original.read_bytes()
    original.write_bytes(content[: norm.start] + bytes([content[norm.start] ^ 1]) + content[norm.start + 1 :])
    assert states(path) == ["to do", "other settings", "other settings"]
    original.write_bytes(content)

    path = write(place, seed=1)
    found = invoke(path, "--json")
    assert changes(place) == before and found.stderr.count("--overwrite replaces it") == 2
    assert [row["exit_code"] for row in json.loads(found.stdout)["jobs"]] == [4, 2, 2]
    replacing = json.loads(invoke(path, "--dry-run", "--json", "--overwrite").stdout)["jobs"]
    assert [row["status"] for row in replacing] == ["would fail", "to do", "to do"]


def test_a_batch_that_is_terminated_ends_its_jobs_and_says_what_was_not_run(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hawqtool", "batch", str(write(place)), "-o", str(tmp_path / "runs")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs/jobs/model-4.0bpw.log"
    deadline = time.monotonic() + 900
    while process.poll() is None and not (log.is_file() and "work " in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 143 and "terminated" in said
    summary = json.loads((tmp_path / "runs/summary.json").read_text())
    assert [row["status"] for row in summary["jobs"]] == ["failed", "not run", "not run"]
    # A measurement that was complete by then is kept, half of one is not; no job has an output.
    left = {p.name for p in (tmp_path / "runs").iterdir()} - {"measurements", ".model-4.0bpw.hawqtool"}
    assert left == {"jobs", "summary.csv", "summary.json"}
    assert all(p.suffix == ".json" for p in tmp_path.glob("runs/measurements/*"))
    assert "terminated" in log.read_text()


def test_jobs_that_were_begun_are_gone_on_with_unless_their_settings_changed(place: Path, tmp_path: Path) -> None:
    def commands(**changes: Any) -> list[tuple[str, ...]]:
        batch = read_batch(write(place, **changes), str(tmp_path / "runs"), None, False)
        batch.folder.mkdir(exist_ok=True)
        return [tuple(program.command) for program in _BatchRun(batch, Silent(), None).prepare()]

    assert not any("--restart" in command for command in commands())
    assert not any("--restart" in command for command in commands())
    assert all(command[-1] == "--restart" for command in commands(seed=3))


def test_problems_are_told_before_any_work(place: Path, tmp_path: Path) -> None:
    path = write(place, rounding="awq", sede=1)
    found = invoke(path, "-o", tmp_path / "runs")
    assert found.exit_code == 2 and not (tmp_path / "runs").exists() and len(found.stderr.splitlines()) == 1
    assert "'awq'" in found.stderr and "did you mean 'seed'" in found.stderr and "and 2 more jobs" in found.stderr
    assert invoke(write(place), "-o", tmp_path / "none/runs").exit_code == 2


def test_the_exit_code_is_that_of_a_gate_or_the_largest() -> None:
    def code(*codes: int | None) -> int:
        return batch_code([{"exit_code": code} for code in codes])

    assert (code(), code(0, None), code(0, 4, 2), code(2, 5), code(0, 3, 5)) == (0, 0, 4, 5, 3)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(10, 0.5), (12, 0.6), (12, 0.4), (15, 0.4), (20, 0.1), (9, 0.9)]
    rows = [{"quantized_bytes": size, "divergence": value} for size, value in points]
    assert [(r["quantized_bytes"], r["divergence"]) for r in front(rows)] == [(9, 0.9), (10, 0.5), (12, 0.4), (20, 0.1)]
