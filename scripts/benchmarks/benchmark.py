"""How fast are the stages of a run, how far from what the machine could do, and in how much memory?

    python scripts/benchmarks/benchmark.py --shape llama-3-8b --blocks 4 --vocabulary 4096 --work DIR
    python scripts/benchmarks/benchmark.py --shape smollm2 --stages round --device cpu --rows 8 --seq-len 512
    python scripts/benchmarks/benchmark.py --shape llama-3-8b --blocks 2 --vocabulary 4096 --scaling
    python scripts/benchmarks/benchmark.py --shape qwen3.5-35b-a3b --blocks 4 --vocabulary 4096

A checkpoint with random bf16 weights in the shape of a known model is written to the working folder (shard by shard;
a finished one is used again), and the stages run on it through the functions that `hawqtool quantize` calls. Beside
the seconds of a block stands the floor: operations and bytes over rates that short probes measure on this machine.
Reading starts from the disk, all else from the page cache. On a GPU a round of one block, of a hybrid of one of each
kind, goes before and is not counted: it compiles kernels. With --rows-file the rows are also written as JSON lines, for
`hawqtool quantize --calibration` on the same checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from hawqtool.config import RunConfig, load_config
from hawqtool.errors import HawqError, UsageError
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import Rows
from hawqtool.rounding.gram import has_float32_products
from hawqtool.runtime.malloc import configure_allocators
from speed.rates import Rates, measure_rates
from speed.shapes import FAMILIES, SHAPES, TOKENIZER_SIZE, FamilyShape, Shape, named_shape, write_checkpoint
from speed.stages import STAGES, Benchmark, Measured, random_rows

SCHEMA = "hawqtool.benchmark/1"
_GIB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, run, print.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    configure_allocators()  # as the command does
    options = _parse(arguments)
    try:
        document = run(options)
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except HawqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, *FAMILIES], default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="transformer blocks [default: the model's]")
    parser.add_argument("--vocabulary", type=int, help="tokens [default: the model's]")
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of the rounding [default: 128]")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row [default: 2048]")
    parser.add_argument("--measure-rows", type=int, help="calibration rows of measuring [default: those of rounding]")
    parser.add_argument("--scoring-rows", type=int, default=8, help="rows behind the scores [default: 8]")
    parser.add_argument("--batch-size", type=int, help="as `hawqtool quantize` has it")
    parser.add_argument("--max-memory", default="auto", help="as `hawqtool quantize` has it")
    parser.add_argument("--bits", help="widths to choose from, as `hawqtool quantize` has it")
    parser.add_argument("--token-importance", default="auto", help="as `hawqtool quantize` has it")
    parser.add_argument("--target-shift", help="as `hawqtool quantize` has it")
    parser.add_argument("--target-bpw", type=float, default=4.25, help="budget of the mixed plan [default: 4.25]")
    parser.add_argument("--group-size", type=int, default=128, help="0: whatever plans choose from [default: 128]")
    parser.add_argument("--rotate", default="off", help="as `hawqtool quantize` has it [default: off]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"in order [default: {','.join(STAGES)}]; or build")
    parser.add_argument("--sparse", action="store_true", help="with --stages build: headers in files that take no room")
    parser.add_argument("--scaling", action="store_true", help="round at other numbers of rows and blocks, and widths")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint and the results; kept [default: removed]")
    parser.add_argument("--rows-file", type=Path, help="write the rows there as JSON lines")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for; returns the JSON form of what was printed."""
    stages = tuple(part.strip() for part in options.stages.split(","))
    unknown = [stage for stage in stages if stage not in (*STAGES, "build")]
    if unknown:
        raise UsageError(f"--stages names {unknown[0]!r}; expected some of build, {', '.join(STAGES)}")
    if options.sparse and stages != ("build",):
        raise UsageError("--sparse writes no weights to run stages on; give --stages build with it")
    work = options.work or Path(tempfile.mkdtemp(prefix="hawqtool-benchmark-"))
    try:
        work.mkdir(parents=True, exist_ok=True)
        return _run(options, [stage for stage in stages if stage != "build"], work)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


def _run(options: argparse.Namespace, stages: Sequence[str], work: Path) -> dict[str, Any]:
    shape = named_shape(options.shape, options.blocks, options.vocabulary)
    if not stages:
        folder = write_checkpoint(shape, work / _label(shape), _drawing_device(options), options.sparse)
        print(f"{folder}: {shape.blocks} blocks")
        if options.rows_file:
            _write_rows(options, shape)
        return {"schema": SCHEMA, "shape": asdict(shape), "folder": str(folder)}
    job = _job(options, shape, work)
    rates = measure_rates(job.device, work)
    document = _head(options, shape, job, rates)
    if options.rows_file:
        _write_rows(options, shape)
    if options.scaling:
        document["scaling"] = _scaling(options, rates, work)
        return document
    if job.device.type == "cuda":
        few = shape.period if isinstance(shape, FamilyShape) else 1
        _bench(options, _with_blocks(options, few), rates, work, options.batch_size or 32).run("round")
    bench = _bench(options, shape, rates, work, options.rows)
    print(f"{'stage':14} {'seconds':>9} {'per block':>10} {'floor':>9} {'x floor':>8} {'device':>9} {'host':>9}")
    results = []
    for stage in stages:
        found = bench.run(stage)
        results.append(asdict(found))
        _print(found)
    if bench.job.offload is not None:
        document["hidden_states"] = bench.job.offload.peak_bytes
        print("hidden states:", ", ".join(f"{_size(n)} {where}" for where, n in bench.job.offload.peak_bytes.items()))
    document |= {"stages": results, "total_seconds": sum(result["seconds"] for result in results)}
    print(f"{'all':14} {document['total_seconds']:9.3f}")
    if bench.experts:
        document["experts"] = bench.experts
        print("linears of experts: " + ", ".join(f"{count} {what}" for what, count in bench.experts.items()))
    return document


def _with_blocks(options: argparse.Namespace, blocks: int) -> Shape | FamilyShape:
    """The shape of the options with another number of blocks."""
    return named_shape(options.shape, blocks, options.vocabulary)


def _drawing_device(options: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")


def _label(shape: Shape | FamilyShape) -> str:
    return f"{shape.name}-{shape.hidden}-{shape.blocks}-{shape.vocabulary}"


def _config(options: argparse.Namespace, folder: Path) -> RunConfig:
    values = {
        "model": str(folder),
        "target_bpw": options.target_bpw,
        "bits": options.bits,
        "group_size": options.group_size or None,
        "rotate": options.rotate,
        "seq_len": options.seq_len,
        "num_samples": options.measure_rows or options.rows,
        "batch_size": options.batch_size,
        "max_memory": options.max_memory,
        "token_importance": options.token_importance,
        "target_shift": options.target_shift,
        "device": options.device,
    }
    return load_config(None, values)


def _job(options: argparse.Namespace, shape: Shape | FamilyShape, work: Path) -> Job:
    return prepare(_config(options, write_checkpoint(shape, work / _label(shape), _drawing_device(options))))


def _rows(options: argparse.Namespace, shape: Shape | FamilyShape, count: int) -> dict[str, Rows]:
    counts = {"calibration": count, "measuring": options.measure_rows or count, "scoring": options.scoring_rows}
    return {
        role: random_rows(number, options.seq_len, shape.vocabulary, seed)
        for seed, (role, number) in enumerate(counts.items())
    }


def _bench(options: argparse.Namespace, shape: Shape | FamilyShape, rates: Rates, work: Path, rows: int) -> Benchmark:
    folder = work / f"{_label(shape)}-results"
    return Benchmark(_job(options, shape, work), rates, _rows(options, shape, rows), folder)


def _write_rows(options: argparse.Namespace, shape: Shape | FamilyShape) -> None:
    """Rows for `hawqtool quantize`, twice as many as are asked for: it draws further sets from the same file."""
    known = min(shape.vocabulary, TOKENIZER_SIZE)
    tokens = random_rows(2 * options.rows + 64, options.seq_len, known, seed=17).tokens
    with options.rows_file.open("w", encoding="utf-8") as stream:
        for row in tokens.tolist():
            stream.write(json.dumps({"input_ids": row}) + "\n")


def _head(options: argparse.Namespace, shape: Shape | FamilyShape, job: Job, rates: Rates) -> dict[str, Any]:
    """Print and return what the figures depend on."""
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else platform.processor() or "cpu"
    products = "half precision" if has_float32_products(job.device, job.dtype) else "float32"
    facts = {
        "schema": SCHEMA,
        "shape": asdict(shape),
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": options.rows,
        "seq_len": options.seq_len,
        "batch_size": job.settings.batch_size,
        "token_importance": job.settings.uses_token_importance,
        "target_shift": job.settings.method.shift,
        "gram_products": products,
        "rates": rates.record(),
    }
    print(f"{name}, torch {torch.__version__}, {facts['threads']} threads; Gram matrices from {products} products")
    print(f"{shape.name}: {shape.blocks} blocks of width {shape.hidden}, {shape.vocabulary} tokens")
    print(f"{options.rows} x {options.seq_len} tokens, {job.settings.batch_size} rows per batch")
    for rate, value in rates.record().items():
        product = rate in ("bfloat16", "float32", "coarse", "float64")
        print(f"  {rate:12} {value / 1e12:9.3f} TFLOP/s" if product else f"  {rate:12} {value / 1e9:9.2f} GB/s")
    return facts


def _print(found: Measured) -> None:
    device, host = (_size(value) for value in (found.device_bytes, found.host_bytes))
    ratio = _ratio(found.per_block, found.floor)
    print(f"{found.stage:14} {found.seconds:9.3f} {ratio} {device:>9} {host:>9}", flush=True)
    for name, (seconds, floor) in found.parts.items():
        print(f"  {name:12} {'':9} {_ratio(seconds, floor)}", flush=True)


def _ratio(seconds: float | None, floor: float | None) -> str:
    times = f"{seconds / floor:8.1f}" if seconds is not None and floor else f"{'':8}"
    first, second = ("" if value is None else f"{value:.4f}" for value in (seconds, floor))
    return f"{first:>10} {second:>9} {times}"


def _size(value: int | None) -> str:
    return "" if value is None else f"{value / _GIB:.2f} GiB"


def _scaling(options: argparse.Namespace, rates: Rates, work: Path) -> list[dict[str, Any]]:
    """Rounding at half and twice the rows, half the width, twice the blocks; each variant once."""
    base = named_shape(options.shape, options.blocks, options.vocabulary)
    variants = {
        "as given": (base, options.rows),
        "half the rows": (base, max(1, options.rows // 2)),
        "twice the rows": (base, 2 * options.rows),
        "half the width": (named_shape(options.shape, options.blocks, options.vocabulary, 0.5), options.rows),
        "twice the blocks": (_with_blocks(options, 2 * base.blocks), options.rows),
    }
    columns = f"{'rows':>6} {'width':>6} {'blocks':>6} {'seconds':>9} {'per block':>10} {'floor':>9} {'x floor':>8}"
    print(f"{'variant':18} {columns}")
    results = []
    _bench(options, _with_blocks(options, 1), rates, work, 1).run("round")  # loads kernels
    for name, (shape, rows) in variants.items():
        found = _bench(options, shape, rates, work, rows).run("round")
        sizes = f"{rows:6} {shape.hidden:6} {shape.blocks:6} {found.seconds:9.3f}"
        print(f"{name:18} {sizes} {_ratio(found.per_block, found.floor)}", flush=True)
        results.append({"variant": name, "rows": rows, "shape": asdict(shape), **asdict(found)})
    return results


if __name__ == "__main__":
    sys.exit(main())
