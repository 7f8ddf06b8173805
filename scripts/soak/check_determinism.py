"""Two runs with equal inputs: do they give equal weights, hash for hash?

Every run is a process of its own with the command that a user would give, as caches and memory of an earlier run must
not matter. Prints one line for each run; the exit code is 1 if a hash differs.

    python scripts/soak/check_determinism.py MODEL --device cuda -- --target-bpw 3.5 --group-size 64
    python scripts/soak/check_determinism.py MODEL --threads 1 2 -- --bits 2,4 --target-bpw 3 --group-size 32
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Run, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", type=int, default=2, help="runs for each number of threads")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of CPU threads to compare (OMP_NUM_THREADS)")
    own, options = _split(sys.argv[1:])
    arguments = parser.parse_args(own)
    if arguments.runs * len(arguments.threads or [0]) < 2:
        parser.error("two runs at least are needed to compare; raise --runs or give several --threads")
    found = []
    for threads in arguments.threads or [None]:
        for _ in range(arguments.runs):
            found.append(run(arguments.model, arguments.device, options, threads))
            print(json.dumps({"threads": threads, **found[-1]}), flush=True)
    equal = {key: len({json.dumps(record[key]) for record in found}) == 1 for key in ("weights", "plan", "scores")}
    print(", ".join(f"{key} {'equal' if same else 'DIFFER'}" for key, same in equal.items()), f"in {len(found)} runs")
    return 0 if equal["weights"] else 1


def run(model: str, device: str, options: list[str], threads: int | None) -> dict[str, object]:
    """Quantize once in a process of its own.

    Returns:
        SHA-256 of every weight file, of the plan's formats, and of the scores (None where nothing was measured).
    """
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "out"
        command = [
            sys.executable,
            "-m",
            "hawqtool",
            "quantize",
            model,
            "-o",
            str(output),
            "--device",
            device,
            "--quiet",
        ]
        done = subprocess.run([*command, *options], env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(f"the run failed with exit code {done.returncode}")
        files = json.loads((output / "reproduce/manifest.json").read_text(encoding="utf-8"))["files"]
        weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
        plan = json.loads((output / "reproduce/plan.json").read_text(encoding="utf-8"))
        formats = {layer["name"]: (layer["bits"], layer["group_size"]) for layer in plan["layers"]}
        table = output / "reproduce/sensitivity.json"
        scores = json.loads(table.read_text(encoding="utf-8"))["scores"] if table.is_file() else None
        return {"weights": weights, "plan": _digest(formats), "scores": _digest(scores)}


def _digest(value: object) -> str | None:
    return None if value is None else hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Own arguments, and those of ``hawqtool quantize`` after ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


if __name__ == "__main__":
    sys.exit(main())
