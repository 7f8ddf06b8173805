"""Equal inputs give equal weights in separate processes, and the script that says so sees a difference."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_llama

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/soak/check_determinism.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("determinism")
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=1200)))
    tiny_llama(folder / "model")
    return folder


def check(place: Path, *own: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    rows = ("--num-samples", "8", "--seq-len", "16", "--no-eval", "--calibration", str(place / "text.txt"))
    shared = ("--bits", "2,4", "--target-bpw", "4", "--group-size", "32", *rows)
    command = [sys.executable, SCRIPT, place / "model", "--device", "cpu", *own, "--", *shared, *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900, check=False)


def test_two_processes_give_equal_weights_plans_and_scores(place: Path) -> None:
    done = check(place)
    assert done.returncode == 0, done.stderr
    *runs, verdict = done.stdout.splitlines()
    first, second = map(json.loads, runs)
    assert first == second and len(first["weights"]["model.safetensors"]) == 64 and first["scores"]
    assert verdict == "weights equal, plan equal, scores equal in 2 runs"


def test_the_script_sees_a_difference(place: Path, tmp_path: Path) -> None:
    # A program of the same name, whose hashes are random, stands for anything that is not deterministic.
    changing = tmp_path / "hawqtool"
    changing.mkdir()
    program = (
        "import json, os, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('-o') + 1]) / 'reproduce'\n"
        "out.mkdir(parents=True)\n"
        "files = {'config.json': {}, 'model.safetensors': {'sha256': os.urandom(8).hex()}}\n"
        "(out / 'manifest.json').write_text(json.dumps({'files': files}))\n"
        "(out / 'plan.json').write_text(json.dumps({'layers': []}))\n"
    )
    (changing / "__init__.py").write_text("")
    (changing / "__main__.py").write_text(program)
    command = [sys.executable, SCRIPT, "model", "--device", "cpu"]
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env={"PATH": "", "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "weights DIFFER, plan equal, scores equal in 2 runs"


def test_one_run_is_nothing_to_compare(place: Path) -> None:
    done = check(place, "--runs", "1")
    assert done.returncode == 2 and "two runs at least" in done.stderr
