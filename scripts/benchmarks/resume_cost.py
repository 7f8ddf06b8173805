"""What does it cost to be killed? A run is timed, run again and killed near its end, and gone on with.

    python scripts/benchmarks/resume_cost.py WORK -- MODEL --target-bpw 3.5 --group-size 64 --calibration text.txt

What follows -- are arguments of `hawqtool quantize`, without --output. Prints the seconds of the undisturbed run, of
the killed one and of the one that went on, the last as a share of the first, and whether the weights are the same. The
exit code is 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run three times and compare.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for both outputs; made where it is missing")
    parser.add_argument("--at", type=float, default=0.9, help="share after which it is killed (default: 0.9)")
    parser.add_argument("quantize", nargs="+", help="arguments of hawqtool quantize, after --")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    whole = timed(options.work / "undisturbed", options.quantize)
    print(f"undisturbed   {whole:8.1f} s", flush=True)
    killed = timed(options.work / "resumed", options.quantize, limit=options.at * whole)
    print(f"killed after  {killed:8.1f} s", flush=True)
    rest = timed(options.work / "resumed", options.quantize)
    print(f"went on for   {rest:8.1f} s, {rest / whole:.1%} of the undisturbed run")
    same = weights(options.work / "undisturbed") == weights(options.work / "resumed")
    print("the weights are the same" if same else "THE WEIGHTS DIFFER")
    return 0 if same else 1


def timed(output: Path, arguments: Sequence[str], limit: float | None = None) -> float:
    """Seconds of a run, which is killed (SIGKILL) once the limit has passed.

    Raises:
        SystemExit: If the run fails, or ends before it could be killed.
    """
    command = [sys.executable, "-m", "hawqtool", "quantize", *arguments, "--output", str(output), "--quiet"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return time.perf_counter() - start
    if code or limit is not None:
        raise SystemExit(f"error: the run ended with code {code} after {time.perf_counter() - start:.1f} s")
    return time.perf_counter() - start


def weights(output: Path) -> dict[str, str]:
    """SHA-256 of the weight files of an output, as it records them."""
    files = json.loads((output / "reproduce" / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


if __name__ == "__main__":
    raise SystemExit(main())
