"""What vLLM makes of folders: its perplexity beside our own on the same rows, tokens per second, bytes of the weights.

    python scripts/benchmarks/serve.py --original MODEL --text wiki.txt OUT1 OUT2 --results results.jsonl
    python scripts/benchmarks/serve.py --shape llama-3-8b --formats 16,fp8-a8f,nvfp4,w4g128 --results speed.jsonl

Each folder is loaded in a process of its own, the original first. Rows are those of ``hawqtool evaluate``; vLLM gives
the log-probabilities of their tokens, and our evaluation is made in this environment behind it. With --shape there are
no weights: vLLM fills the layers of a configuration by itself, and speed is measured alone. vLLM may live in another
environment (--python, --engine-path). Every step gives a line of JSON as it ends, so that a script that is cut has lost
nothing. The last lines compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_MARK = "RESULT "
_TAIL = 25


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve each folder, evaluate each, compare.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        models = _shapes(options, Path(scratch)) if options.shape else _folders(options)
        rows = [] if options.shape else report_rows(options)
        for name, folder in models.items():
            served(options, name, folder, rows, Path(scratch))
    if options.own and not options.shape:
        for name, folder in list(models.items())[1:]:
            evaluated(options, name, folder)
    for line in compared(options.results):
        record(options, **line)
    if options.record:
        keep_runs(options)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="folders that hawqtool wrote")
    parser.add_argument("--original", type=Path, help="the model that they are made from")
    parser.add_argument("--text", help="text to judge by, as --eval-data takes it")
    parser.add_argument("--rows", type=int, default=16, help="rows of it [default: 16]")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row [default: 2048]")
    parser.add_argument("--shape", help="a shape of benchmark.py in place of folders: speed alone")
    parser.add_argument("--formats", default="16,fp8-a8f", help="labels, 16 for 16 bits; with --shape")
    parser.add_argument("--streams", default="1,16,64,256", help="streams at a time [default: 1,16,64,256]")
    parser.add_argument("--generated", type=int, default=64, help="tokens of a stream [default: 64]")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of a prompt; 0 for none [default: 2048]")
    parser.add_argument("--cache-gib", type=float, default=8.0, help="memory of the KV cache [default: 8]")
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vLLM, as JSON")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has vLLM [default: this one]")
    parser.add_argument("--engine-path", help="PYTHONPATH of its process [default: this one's]")
    parser.add_argument("--no-own", dest="own", action="store_false", help="without our own evaluation")
    parser.add_argument("--record", action="store_true", help="add what agrees to the runs that reports name")
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds of a folder [default: 900]")
    parser.add_argument("--work", type=Path, help="folder for what is in between")
    parser.add_argument("--results", type=Path, required=True, help="lines of JSON are added to it")
    options = parser.parse_args(arguments)
    if not options.shape and (options.original is None or options.text is None):
        parser.error("--original and --text are needed, or --shape")
    return options


def record(options: argparse.Namespace, **line: Any) -> None:
    """Add a line to the results and print it."""
    text = json.dumps({"at": time.strftime("%Y-%m-%d %H:%M:%S"), **line})
    with options.results.open("a", encoding="utf-8") as stream:
        stream.write(text + "\n")
    print(text, flush=True)


def _folders(options: argparse.Namespace) -> dict[str, Path]:
    """Folders by name, the original first."""
    return {"original": options.original, **{folder.name: folder for folder in options.folders}}


def _shapes(options: argparse.Namespace, place: Path) -> dict[str, Path]:
    """Folders with a configuration alone, by label."""
    from serving.shapes import write_configuration

    found = {}
    for label in options.formats.split(","):
        found[label] = write_configuration(options.shape, label, place / label.replace("+", "-"))
    return found


def report_rows(options: argparse.Namespace) -> list[list[int]]:
    """Tokens of the rows that ``hawqtool evaluate`` judges by."""
    from hawqtool.pipeline.run.job import prepare
    from hawqtool.pipeline.stages.rows import evaluation_rows

    config = own_config(options)
    rows = evaluation_rows(prepare(config, writes=False), options.text, options.rows).tokens
    return [[int(token) for token in row] for row in rows]


def own_config(options: argparse.Namespace) -> Any:
    """The configuration of our own evaluation."""
    from hawqtool.config import load_config

    given = {"model": str(options.original), "eval_data": options.text, "eval_samples": options.rows}
    return load_config(None, given | {"seq_len": options.seq_len})


def served(options: argparse.Namespace, name: str, folder: Path, rows: list[list[int]], scratch: Path) -> None:
    """Run a folder in the engine; its lines are recorded, and the end of its output where it failed."""
    settings = {
        "model": str(folder),
        "rows": rows,
        "streams": [int(count) for count in options.streams.split(",") if count],
        "generated": options.generated,
        "prefill": options.prefill,
        "cache_gib": options.cache_gib,
        "engine": options.engine,
        "dummy": bool(options.shape),
    }
    given = scratch / "settings.json"
    given.write_text(json.dumps(settings), encoding="utf-8")
    environment = dict(os.environ)
    if options.engine_path is not None:
        environment["PYTHONPATH"] = options.engine_path
    script = Path(__file__).with_name("serving") / "engine.py"
    command = [options.python, "-u", str(script), str(given)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        limit = threading.Timer(options.limit, process.kill)  # an engine may hang without a line
        limit.start()
        tail = _followed(options, name, process)
        limit.cancel()
    if process.returncode:
        record(options, name=name, step="end", code=process.returncode, output=tail)


def _followed(options: argparse.Namespace, name: str, process: Any) -> list[str]:
    """Record the lines of a process as they come; the last of the others are returned, all go to a log."""
    tail: list[str] = []
    with options.results.with_suffix(".log").open("a", encoding="utf-8") as log:
        log.write(f"===== {name}\n")
        for line in process.stdout:
            if line.startswith(_MARK):
                record(options, name=name, **json.loads(line[len(_MARK) :]))
            else:
                log.write(line)
                tail = [*tail, line.rstrip()[:300]][-_TAIL:]
    return tail


def evaluated(options: argparse.Namespace, name: str, folder: Path) -> None:
    """Our own perplexity of a folder and of the original, on the same rows."""
    from hawqtool.errors import HawqError
    from hawqtool.pipeline.evaluate import run_evaluate
    from hawqtool.runtime.reporter import Silent

    try:
        found = run_evaluate(own_config(options), folder, Silent())
    except HawqError as error:
        record(options, name=name, step="own", error=str(error))
        return
    record(options, name="original", step="own", **found["original"])
    record(options, name=name, step="own", **found["quantized"])


def keep_runs(options: argparse.Namespace) -> None:
    """Add folders on which the engine agrees to the runs that the engines' verdicts name, in place of older ones."""
    from hawqtool.export.engines import CLOSE, RUNS_FILE, VLLM
    from hawqtool.export.packed_reader import read_config
    from hawqtool.formats.cache import scheme_format

    lines = [json.loads(text) for text in options.results.read_text(encoding="utf-8").splitlines()]
    loaded = {line["name"]: line for line in lines if line["step"] == "load"}
    agreeing = {line["name"]: line for line in lines if line["step"] == "compared" and abs(line["difference"]) <= CLOSE}
    runs = json.loads(RUNS_FILE.read_text(encoding="utf-8"))
    for folder in (folder for folder in options.folders if folder.name in agreeing):
        config, facts = read_config(folder)["quantization_config"], loaded[folder.name]
        scheme = config.get("kv_cache_scheme")
        run = {
            "engine": VLLM,
            "version": facts["vllm"],
            "card": facts["card"],
            "date": facts["at"][:10],
            "labels": sorted(config["config_groups"]),
            "cache": None if scheme is None else scheme_format(scheme),
            "difference": round(agreeing[folder.name]["difference"], 6),
        }
        same = ("engine", "version", "card", "labels", "cache")
        runs = [known for known in runs if any(known[name] != run[name] for name in same)] + [run]
    RUNS_FILE.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")


def compared(path: Path) -> Iterator[dict[str, Any]]:
    """What the lines of a file say together: engine and own perplexity of each folder, the last of each."""
    from hawqtool.export.engines import CLOSE

    engine, own = dict[str, float](), dict[str, float]()
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "perplexity" in line and line["step"] in ("perplexity", "own"):
            (engine if line["step"] == "perplexity" else own)[line["name"]] = line["perplexity"]
    for name, value in engine.items():
        if name in own:
            difference = value / own[name] - 1
            yield {
                "name": name,
                "step": "compared",
                "engine": value,
                "own": own[name],
                "difference": difference,
                "close": abs(difference) <= CLOSE,
            }


if __name__ == "__main__":
    raise SystemExit(main())
