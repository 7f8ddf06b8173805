"""A sentence encoder at 4 and 3 stored bits: what mixing and error compensation keep of its embeddings.

    python scripts/research/study_minilm.py MODEL --calibration A.txt --eval-data B.txt OUT

MODEL is what scripts/research/fetch_minilm.py makes. Every folder is written by hawqtool and loaded by
``transformers.AutoModel``, as a user would. Embeddings are those of sentence-transformers: mean over the real tokens,
normalised. Per budget: gptq and nearest rounding (rtn), mixed and uniform. OUT is a folder for the JSON and the models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from torch import Tensor

from hawqtool.allocation.uniform import best_uniform
from hawqtool.config import RunConfig
from hawqtool.pipeline.run.files import plan_document, write_json
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.menu import budget_bytes
from hawqtool.records import BitPlan

GROUP_SIZE, WIDTHS = 64, "2,3,4,5,6,7,8"
BATCH, SHORTEST, LONGEST = 32, 40, 300
"""Sentences per batch; characters of a sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantize, embed, compare.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = sentences(options.eval_data, options.sentences)
    original = embeddings(options.model, texts)
    results = []
    for target in options.targets:
        for rounding in ("gptq", "rtn"):
            for kind in ("mixed", "uniform"):
                results.append(study(options, target, rounding, kind, texts, original))
                print(line(results[-1]), flush=True)
    rerun = study(options, options.targets[0], "gptq", "mixed", texts, original, "repeat")
    same = rerun["weights_sha256"] == results[0]["weights_sha256"]
    print(f"repeated run: weight files {'equal' if same else 'DIFFER'}")
    settings = {"rows": [options.num_samples, options.seq_len], "sentences": len(texts), "group_size": GROUP_SIZE}
    write_json(options.out / "study_minilm.json", settings | {"results": results, "repeated_run_equal": same})
    return 0 if same else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path, required=True, help="text whose sentences are embedded")
    parser.add_argument("--targets", type=float, nargs="+", default=[4.0, 3.0], help="stored bits per weight")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=200)
    return parser.parse_args(arguments)


def sentences(path: Path, count: int) -> list[str]:
    """Evenly spread sentences of a text."""
    parts = re.split(r"(?<=[.!?])\s+|\n", path.read_text(encoding="utf-8"))
    fit = list(dict.fromkeys(p.strip() for p in parts if SHORTEST <= len(p.strip()) <= LONGEST))
    if len(fit) < count:
        raise SystemExit(f"{path} has {len(fit)} sentences of {SHORTEST} to {LONGEST} characters, {count} are needed")
    return [fit[number * len(fit) // count] for number in range(count)]


def embeddings(folder: Path, texts: Sequence[str]) -> Tensor:
    """``[sentences, width]`` float32: mean over real tokens, of length one."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(list(texts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None].float()
            states = model(**batch).last_hidden_state
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def study(
    options: argparse.Namespace,
    target: float,
    rounding: str,
    kind: str,
    texts: Sequence[str],
    original: Tensor,
    suffix: str = "",
) -> dict[str, Any]:
    """Quantize one way and compare the embeddings with the original's."""
    folder = options.out / f"{rounding}-{kind}-{target:g}{suffix}"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    report = quantize(options, target, rounding, kind, folder)
    seconds = time.perf_counter() - start
    own = report["evaluation"]["mixed"]
    return {
        "target_bpw": target,
        "rounding": rounding,
        "kind": kind,
        "formats": own["formats"],
        "bpw_linears": report["sizes"]["bpw_linears"],
        "predicted_error": report["predicted_loss"],
        "row_error": own["embedding_error"],
        "row_error_uniform": report["evaluation"]["uniform"]["embedding_error"],
        "seconds": seconds,
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    } | compare(original, embeddings(folder, texts))


def quantize(options: argparse.Namespace, target: float, rounding: str, kind: str, folder: Path) -> dict[str, Any]:
    """Report of a run; a uniform one gets the best uniform plan that fits the budget as its plan file."""
    command = [
        sys.executable, "-m", "hawqtool", "quantize", str(options.model), "-o", str(folder), "--json", "--quiet",
        "--rounding", rounding, "--calibration", str(options.calibration), "--eval-data", str(options.eval_data),
        "--num-samples", str(options.num_samples), "--seq-len", str(options.seq_len), "--device", "cpu",
    ]  # fmt: skip
    if kind == "mixed":
        # With a group size of our own the mixed plan is what is written, even where uniform is better.
        command += ["--target-bpw", str(target), "--bits", WIDTHS, "--group-size", str(GROUP_SIZE)]
    else:
        command += ["--plan", str(uniform_plan(options, target))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    report = json.loads(done.stdout)
    if report["shipped"] != "mixed":
        raise SystemExit(f"{folder.name}: expected the plan of the budget, but {report['shipped']} was written")
    return dict(report)


def uniform_plan(options: argparse.Namespace, target: float) -> Path:
    """Plan file of the best uniform plan that fits a budget."""
    values: dict[str, Any] = {"model": str(options.model), "target_bpw": target, "device": "cpu"}
    job = prepare(RunConfig(**values))
    best = best_uniform(job.units, budget_bytes(job.config, job.units, 0, job.pins))
    if best is None:
        raise SystemExit(f"no uniform plan fits {target} stored bits per weight")
    plan = BitPlan(best.formats, best.stored_bytes, sum(unit.num_weights for unit in job.units))
    path: Path = options.out / f"uniform-{target:g}.json"
    write_json(path, plan_document(plan, job.units, job.unquantized_linears))
    return path


def compare(original: Tensor, found: Tensor) -> dict[str, float]:
    """Cosines of unit embeddings ``[sentences, width]``, and the change of all pairwise similarities."""
    cosine = (original.double() * found.double()).sum(1)
    upper = torch.triu_indices(len(original), len(original), 1)
    before, after = (e.double() @ e.double().t() for e in (original, found))
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "cosine_p5": float(cosine.quantile(0.05)),
        "similarity_change": float((after - before)[upper[0], upper[1]].abs().mean()),
    }


def line(result: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{result['target_bpw']:.1f} {result['rounding']:4s} {result['kind']:7s} {result['bpw_linears']:.3f} bits  "
        f"cosine mean {result['cosine_mean']:.4f} p5 {result['cosine_p5']:.4f} min {result['cosine_min']:.4f}  "
        f"similarities {result['similarity_change']:.4f}  error {result['row_error']:.4f} "
        f"(predicted {result['predicted_error'] or float('nan'):.4f})  {' '.join(result['formats'])}  "
        f"{result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
