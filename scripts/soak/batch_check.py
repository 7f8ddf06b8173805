"""Twelve jobs on tiny models, three of them broken and one gate out of reach: what a batch promises, checked.

    python scripts/soak/batch_check.py [FOLDER]

Prints the table of both runs; fails where a promise does not hold. Takes a few minutes on a CPU.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.tiny import tiny_model  # noqa: E402

BUDGETS = (
    {"target_bpw": 3.5},
    {"target_bpw": 4.5},
    {"target_bpw": 6.0},
)
GOOD, BROKEN = ("llama", "qwen3", "mistral"), "broken"
UNREACHABLE = {"name": "out-of-reach", "target_kl": 1e-9}


def prepare(folder: Path) -> Path:
    """Models, text and the batch file: one of the twelve jobs has a gate that cannot be met."""
    generator = random.Random(0)
    (folder / "text.txt").write_text("".join(generator.choices("abcdefgh ", k=4000)))
    for seed, kind in enumerate((*GOOD, BROKEN)):
        tiny_model("llama" if kind == BROKEN else kind, folder / "models" / kind, seed=seed)
    weights = folder / "models" / BROKEN / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    models = [str(folder / "models" / kind) for kind in GOOD]
    document: dict[str, Any] = {
        "output": str(folder / "runs"),
        "defaults": {
            "calibration": str(folder / "text.txt"),
            **{"group_size": 32, "num_samples": 8, "seq_len": 32, "eval_samples": 8, "device": "cpu"},
        },
        "matrix": {"model": [*models[1:], str(folder / "models" / BROKEN)], "target": list(BUDGETS)},
        "jobs": [{"model": models[0], **budget} for budget in (*BUDGETS[:2], UNREACHABLE)],
    }
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def hawqtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line; stderr goes where ours goes."""
    command = [sys.executable, "-m", "hawqtool", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def times(folder: Path) -> dict[str, int]:
    """When each result was written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.glob("*/report.json"))}


def expect(what: str, found: object, wanted: object) -> None:
    """Print a promise, and stop where it does not hold."""
    print(f"{'ok  ' if found == wanted else 'FAIL'}  {what}: {found}")
    if found != wanted:
        raise SystemExit(f"expected {wanted}")


def check(folder: Path) -> None:
    """Run the batch twice and compare."""
    path, runs = prepare(folder), folder / "runs"
    first = hawqtool("batch", str(path))
    print(first.stdout)
    summary = json.loads((runs / "summary.json").read_text())
    codes = sorted(job["exit_code"] for job in summary["jobs"])
    expect("exit code", first.returncode, 3)
    expect("exit codes of the jobs", codes, [0] * 8 + [3] + [4] * 3)
    expect("jobs that were run", summary["ran"], 12)
    expect("measurements that were made", summary["measured"], 3)
    expect("logs that tell of measuring", sum("reverse sweep" in p.read_text() for p in runs.glob("jobs/*.log")), 3)
    expect("measurements in the folder", len(list((runs / "measurements").iterdir())), 3)
    expect("lines of the CSV file", len((runs / "summary.csv").read_text().splitlines()), 13)
    expect("figures", sorted(p.name for p in runs.glob("*.png")), sorted(f"pareto-{kind}.png" for kind in GOOD))
    before = times(runs)
    again = hawqtool("batch", str(path))
    print(again.stdout)
    rerun = json.loads((runs / "summary.json").read_text())
    expect("exit code of the rerun", again.returncode, 3)
    expect("jobs that were run again", [j["name"].split("-")[0] for j in rerun["jobs"] if j["ran"]], [BROKEN] * 3)
    expect("results are as they were", times(runs) == before, True)
    expect("measurements that were made again", rerun["measured"], 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as name:
            check(Path(name))
