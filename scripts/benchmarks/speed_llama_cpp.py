"""Speed and memory of GGUF files in llama.cpp on a CPU: bfloat16, single types and files of ours.

    python scripts/benchmarks/speed_llama_cpp.py MODEL --template MODEL.gguf --files OURS.gguf --threads 2

MODEL in bfloat16 and in each of ``--types`` is made here, with the template's metadata and ggml's own quantizer. Each
file is run in a process of its own by the library inside the xllamacpp wheel: tokens per second of a prompt and of
single tokens, and what is resident afterwards, its own pages and those of the mapped file. Medians of three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PROMPT, GENERATED, REPETITIONS = 128, 24, 3

_TOKENS = [10 + place % 100 for place in range(PROMPT)]


def main() -> int:
    """Make the files, run each, print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    parser.add_argument("--template", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q8_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="measure MODEL, a file, in this process")
    parser.add_argument("--work", type=Path, default=None, help="folder for the files that are made")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.model, arguments.threads)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        made = made_files(arguments, Path(scratch)) if arguments.template else []
        for path in (*made, *arguments.files):
            command = [sys.executable, __file__, str(path), "--one", "--threads", str(arguments.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.strip(), flush=True)
    return 0


def made_files(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """The model in bfloat16 and in some types as GGUF files."""
    import torch

    from compare_llama_cpp import Quantizer
    from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, STORED_TYPES, StoredType
    from hawqtool.checkpoint.reader import TensorReader
    from hawqtool.config import load_config
    from hawqtool.export.gguf.writer import GgufWriter
    from hawqtool.pipeline.gguf.tensors import prepare_gguf
    from hawqtool.runtime.reporter import Silent

    settings = {"model": str(arguments.model), "template": str(arguments.template), "device": "cpu"}
    settings |= {"to": "gguf", "target_bpw": "16"}
    gguf = prepare_gguf(load_config(None, settings), Silent())
    reader, quantizer, plain = TensorReader(gguf.job.index), Quantizer(), STORED_TYPES[30]
    found = []
    for kind in (plain, *(BLOCK_TYPES[name] for name in arguments.types)):
        kinds: dict[str, StoredType] = {place.tensor: kind for place in gguf.places.values()}
        path = folder / f"{kind.name}.gguf"
        with GgufWriter(gguf.template, gguf.layout(kinds), path) as writer:
            for name, place in gguf.places.items():
                weight = gguf.matrix(name, reader)
                if kind is plain:
                    stored = weight.to(torch.bfloat16).contiguous().view(torch.uint8)
                else:
                    stored = quantizer(weight.float(), BLOCK_TYPES[kind.name], None)
                stored = stored if place.piece.rows is None else stored[place.piece.rows]
                writer.write(place.tensor, stored, place.first_row)
        found.append(path)
    return found


def measured(path: Path, threads: int) -> dict[str, Any]:
    """Tokens per second and resident memory of a file."""
    from tests.support.llama_cpp import Session

    with Session(path, PROMPT + GENERATED, threads) as session:
        prompts, singles = [], []
        session.decode(_TOKENS, 0)  # pages of the file are read, buffers made
        for _ in range(REPETITIONS):
            session.clear()
            start = time.perf_counter()
            session.decode(_TOKENS, 0)
            prompts.append(PROMPT / (time.perf_counter() - start))
            start = time.perf_counter()
            for place in range(PROMPT, PROMPT + GENERATED):
                session.decode([10 + place % 100], place)
            singles.append(GENERATED / (time.perf_counter() - start))
        resident = {key: kilobytes / 1000 for key, kilobytes in _status().items()}
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "threads": threads,
        "prompt_tokens_per_second": round(statistics.median(prompts), 2),
        "generated_tokens_per_second": round(statistics.median(singles), 2),
        "resident_mb": resident,
        "cpu": _processor(),
    }


def _status() -> dict[str, float]:
    """Resident kilobytes of this process: its own and those of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    wanted = {"VmRSS:": "all", "RssAnon:": "own", "RssFile:": "file"}
    parts = [line.split() for line in lines]
    return {wanted[part[0]]: float(part[1]) for part in parts if part and part[0] in wanted}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)


if __name__ == "__main__":
    raise SystemExit(main())
