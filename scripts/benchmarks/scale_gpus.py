"""How does a run scale over the GPUs of a machine? Seconds by stage, peak memory of each GPU, hashes of the weights.

    python scripts/benchmarks/scale_gpus.py --shape llama-3-8b --blocks 8 --sets 1+2,2+2,4 --work DIR --out DIR
    python scripts/benchmarks/scale_gpus.py --shape qwen3-30b-a3b --blocks 2 --sets 1+2,4 --work DIR --out DIR
    python scripts/benchmarks/scale_gpus.py --shape tiny --vocabulary 600 --sets 1+2 --rows 16 --seq-len 32 \
        --eval-rows 8 --device cpu --more "--group-size 32" --work DIR --out DIR

`hawqtool quantize` runs as users start it, on random weights in the shape of a known model. Each set is a list of
--gpus joined by +: these runs go side by side on GPUs of their own; sets follow each other. OUT/results.jsonl gets a
line as each run ends, OUT/*.err its progress with the seconds, so that a script that is cut has lost nothing. Runs of
the same number must have one hash. CUDA_VISIBLE_DEVICES says which GPUs there are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SAMPLED_SECONDS, _TAIL = 0.5, 4
_KNOWN_TOKENS = (2, 258)
"""Tokens of the tokenizer that `benchmark.py` writes, but for special ones."""


@dataclass
class Results:
    """Lines of results.jsonl, written as they come.

    Args:
        folder: Where it lies.
        label: Shape and blocks.
    """

    folder: Path
    label: str
    start: float = field(default_factory=time.monotonic)
    runs: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **record: Any) -> None:
        """Write and print a line."""
        line = json.dumps({"at": round(time.monotonic() - self.start, 1), "shape": self.label, **record})
        with self._lock, (self.folder / "results.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the model, run the sets, compare.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    options = _parse(arguments)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
    results = Results(options.out, f"{options.shape}-{options.blocks or 'all'}")
    model = _built(options, results)
    for name, count, seed in (("rows", 2 * options.rows + 64, 17), ("judged", 4 * options.eval_rows + 64, 18)):
        _write_rows(options.work / f"{name}.jsonl", count, options.seq_len, seed)
    for position, part in enumerate(options.sets.split(",")):
        free, threads, peaks, stop = list(gpus), [], dict[str, int](), threading.Event()
        watch = threading.Thread(target=_watch, args=(peaks, stop), daemon=True)
        watch.start()
        for number, count in enumerate(int(size) for size in part.split("+")):
            own, free = free[:count], free[count:]
            run = options, results, model, own, f"{position}-{number}-n{count}", peaks
            threads.append(threading.Thread(target=_run, args=run))
            threads[-1].start()
        for thread in threads:
            thread.join()
        stop.set()
        watch.join()
    _compare(results)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", help="as benchmark.py has it")
    parser.add_argument("--blocks", type=int, help="transformer blocks [default: the model's]")
    parser.add_argument("--vocabulary", type=int, help="tokens [default: the model's]")
    parser.add_argument("--sets", default="1+2,2+2,4", help="numbers of GPUs [default: 1+2,2+2,4]")
    parser.add_argument("--rows", type=int, default=128, help="calibration rows [default: 128]")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row [default: 2048]")
    parser.add_argument("--eval-rows", type=int, default=32, help="report rows [default: 32]")
    parser.add_argument("--target-bpw", default="4.25", help="budget [default: 4.25]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds of a run [default: 900]")
    parser.add_argument("--more", default="", help="further arguments of quantize, in one word")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; used again")
    parser.add_argument("--out", type=Path, required=True, help="folder for results, reports and logs")
    return parser.parse_args(arguments)


def _built(options: argparse.Namespace, results: Results) -> Path:
    """The folder of the model, which `benchmark.py` writes."""
    script = Path(__file__).with_name("benchmark.py")
    command = [sys.executable, str(script), "--shape", options.shape, "--stages", "build", "--work", str(options.work)]
    for name in ("blocks", "vocabulary"):
        value = getattr(options, name)
        command += [f"--{name}", str(value)] if value else []
    said = subprocess.run([*command, "--device", options.device], stdout=subprocess.PIPE, text=True, check=True).stdout
    folder = Path(said.strip().splitlines()[-1].rsplit(": ", 1)[0])
    results.add(built=str(folder))
    return folder


def _write_rows(path: Path, count: int, length: int, seed: int) -> None:
    """Rows of random tokens as JSON lines."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            stream.write(json.dumps({"input_ids": [generator.randrange(*_KNOWN_TOKENS) for _ in range(length)]}) + "\n")


def _watch(peaks: dict[str, int], stop: threading.Event) -> None:
    """Note the most MiB that each GPU holds, by nvidia-smi, until told to stop."""
    command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    while not stop.wait(_SAMPLED_SECONDS) and shutil.which(command[0]):
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for line in told.splitlines():
            index, used = (word.strip() for word in line.split(","))
            peaks[index] = max(peaks.get(index, 0), int(used))


def _run(
    options: argparse.Namespace, results: Results, model: Path, gpus: Sequence[str], name: str, peaks: dict[str, int]
) -> None:
    """One run, and its line."""
    label, start = f"{results.label}-{name}", time.monotonic()
    output, log = options.work / f"out-{label}", results.folder / f"{label}.err"
    command = [sys.executable, "-m", "hawqtool", "quantize", str(model), "-o", str(output), "--overwrite", "--json"]
    command += ["--gpus", str(len(gpus)), "--device", options.device, "--target-bpw", options.target_bpw]
    command += ["--num-samples", str(options.rows), "--seq-len", str(options.seq_len)]
    command += ["--calibration", str(options.work / "rows.jsonl"), "--eval-data", str(options.work / "judged.jsonl")]
    command += ["--eval-samples", str(options.eval_rows), *options.more.split()]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as child:
        reader = threading.Thread(target=_note, args=(child.stderr, log, start), daemon=True)
        reader.start()
        killer = threading.Timer(options.limit, child.send_signal, (signal.SIGTERM,))
        killer.start()
        assert child.stdout is not None  # it is a pipe
        said = child.stdout.read()
        code = child.wait()
        killer.cancel()
        reader.join()
    told: dict[str, Any] = {"run": name, "gpus": len(gpus), "seconds": round(time.monotonic() - start, 1)}
    if code:
        results.add(**told, exit_code=code, said=log.read_text(encoding="utf-8").splitlines()[-_TAIL:])
        return
    (results.folder / f"{label}.report.json").write_text(said, encoding="utf-8")
    report = json.loads(said)
    told |= {"timings": {stage: round(seconds, 2) for stage, seconds in report["timings"].items()}}
    told |= {"hash": _hash(output), "shipped": report["shipped"], "peak_mib": {gpu: peaks.get(gpu) for gpu in gpus}}
    results.runs.append(told)
    results.add(**told)
    with suppress(OSError):
        shutil.rmtree(output)


def _note(lines: Any, log: Path, start: float) -> None:
    with log.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(f"{time.monotonic() - start:8.1f} {line}")
            stream.flush()


def _hash(output: Path) -> str:
    """Hash of the weight files, from the manifest."""
    files = json.loads((output / "reproduce" / "manifest.json").read_text(encoding="utf-8"))["files"]
    return "".join(entry["sha256"][:16] for name, entry in sorted(files.items()) if name.endswith(".safetensors"))[:64]


def _compare(results: Results) -> None:
    """Say how much faster each run was than that of one GPU, and whether equal runs gave equal weights."""
    alone = next((run for run in results.runs if run["gpus"] == 1), None)
    for run in results.runs if alone else ():
        assert alone is not None  # else there is nothing to go over
        results.add(
            speedup=run["run"],
            whole=round(alone["seconds"] / run["seconds"], 2),
            rounding=round(_rounding(alone) / _rounding(run), 2),
            stages={
                stage: round(seconds / run["timings"][stage], 2)
                for stage, seconds in alone["timings"].items()
                if run["timings"].get(stage)
            },
        )
    for count in sorted({run["gpus"] for run in results.runs}):
        hashes = [run["hash"] for run in results.runs if run["gpus"] == count]
        results.add(gpus=count, runs=len(hashes), equal=len(set(hashes)) == 1)


def _rounding(run: dict[str, Any]) -> float:
    return sum(seconds for stage, seconds in run["timings"].items() if stage.startswith("round "))


if __name__ == "__main__":
    sys.exit(main())
