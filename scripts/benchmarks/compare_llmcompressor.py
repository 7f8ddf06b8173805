"""Compare hawqtool with llm-compressor's GPTQ: same rows, same run, seconds of rounding, memory and KL side by side.

    python scripts/benchmarks/compare_llmcompressor.py MODEL --peer-python ENV/bin/python \
        --calibration A.txt --eval-data B.txt [--format nvfp4]

llm-compressor needs an environment of its own (``pip install llmcompressor``); this script runs itself there with
``--worker``. Rows are the first ones of the text, in file order, for both. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCHEMES = {"nvfp4": "NVFP4A16"}
"""Presets of llm-compressor by labels of ours, of weights alone."""


def main() -> int:
    """Run both tools and print one table."""
    arguments = _parse()
    if arguments.worker:
        return _worker(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        peer = Path(scratch) / "peer"
        output, peer_memory = _run([arguments.peer_python, __file__, *sys.argv[1:], "--worker", str(peer)])
        peer_seconds = json.loads(output.strip().splitlines()[-1])["seconds"]
        answer, memory = _run(_hawqtool_command(arguments, Path(scratch) / "ours"))
        peer_kl = divergence(arguments, peer)
    report = json.loads(answer)
    ours = report["evaluation"]["uniform"]
    importance = report["timings"].get("token importance", 0.0)
    seconds = ours["rounding_seconds"] + importance
    kind = arguments.format or f"{arguments.bits} bit, group {arguments.group_size}"
    print(f"{arguments.model.name}, {kind}, {arguments.num_samples} x {arguments.seq_len} tokens")
    print(f"llm-compressor  rounding {peer_seconds:6.1f} s   peak {peer_memory:.2f} GB   KL {peer_kl:.4f}")
    kl = f"{ours['kl']:.4f} ± {ours['kl_stderr']:.4f}"
    print(f"hawqtool        rounding {seconds:6.1f} s   peak {memory:.2f} GB   KL {kl}")
    print(f"  of this the weights of tokens {importance:6.1f} s")
    print(f"ratios          seconds {seconds / peer_seconds:.2f}   KL {ours['kl'] / peer_kl:.2f}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--format", choices=SCHEMES, help="in place of bits and group size")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=40)
    parser.add_argument("--peer-dtype", default="auto", help="dtype that the peer loads the model in")
    parser.add_argument("--worker", metavar="OUT", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(command: list[str]) -> tuple[str, float]:
    """What a command prints, and the most memory that its process held at a time, in GB (Linux)."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            said = errors.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{Path(command[0]).name} failed with code {process.returncode}:\n{said}")
        return out.read().decode(), used.ru_maxrss * 1024 / 1e9


def _hawqtool_command(arguments: argparse.Namespace, output: Path) -> list[str]:
    stored = arguments.bits + 16 / arguments.group_size
    integers = ["--bits", str(arguments.bits), "--target-bpw", str(stored), "--group-size", str(arguments.group_size)]
    return [
        sys.executable, "-m", "hawqtool", "quantize", str(arguments.model), "-o", str(output), "--json", "--quiet",
        *(["--formats", arguments.format] if arguments.format else integers),
        "--calibration", str(arguments.calibration), "--num-samples", str(arguments.num_samples),
        "--seq-len", str(arguments.seq_len), "--eval-data", str(arguments.eval_data),
        "--eval-samples", str(arguments.eval_samples),
    ]  # fmt: skip


def token_rows(model: Path, text: Path, count: int, seq_len: int) -> Any:
    """First ``count`` rows of a text as hawqtool cuts them, ``[count, seq_len]`` int64."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    word = tokenizer("a", return_special_tokens_mask=True)
    begin = torch.tensor(word.input_ids[: word.special_tokens_mask.index(0)], dtype=torch.int64)
    tokens = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    length = seq_len - len(begin)
    rows = torch.tensor(tokens[: count * length]).view(count, length)
    return torch.cat([begin.expand(count, len(begin)), rows], dim=1)


def divergence(arguments: argparse.Namespace, folder: Path) -> float:
    """Mean KL of a folder that transformers loads to the original, on the evaluation rows."""
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    total = 0.0
    rows = token_rows(arguments.model, arguments.eval_data, arguments.eval_samples, arguments.seq_len)
    with torch.no_grad():
        packed = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if arguments.format else torch.float32)
        packed(rows[:1, :1])  # which unpacks it, floats of few bits to bfloat16
        quantized = torch.nn.Module.float(packed).eval()
        for row in rows:
            log_p = original(row[None]).logits[0].log_softmax(-1)
            log_q = quantized(row[None]).logits[0].log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return total / len(rows)


def _worker(arguments: argparse.Namespace) -> int:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = token_rows(arguments.model, arguments.calibration, arguments.num_samples, arguments.seq_len)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.peer_dtype)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": rows.new_ones(rows.shape).tolist()})
    weights = {
        "num_bits": arguments.bits, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": arguments.group_size, "actorder": "static",
    }  # fmt: skip
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    scheme = {"targets": "Linear", "scheme": SCHEMES[arguments.format]} if arguments.format else groups
    recipe = GPTQModifier(**scheme, ignore=["lm_head"])
    start = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(rows))
    seconds = time.perf_counter() - start
    model.save_pretrained(arguments.worker, save_compressed=True)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.worker)
    print(json.dumps({"seconds": seconds}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
