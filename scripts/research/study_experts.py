"""Mixtures of experts with trained, uneven routing: what quantization does to them, and whether it is what it says.

    PYTHONPATH=. python scripts/research/study_experts.py --calibration A.txt --eval-data B.txt OUT

Builds a small Qwen3-MoE and a small Mixtral (8 experts, 2 per token), trains each on characters of the calibration
text without a loss that would even out the routing, quantizes at two budgets, loads the results through transformers,
and checks that their logits are those of the original with the dequantized weights. ``--profile vllm`` lets every
block have its own width of experts; transformers reads one for all, so nothing is loaded then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.utils import logging as transformers_logging

import hawqtool
from hawqtool.export.packed_reader import PackedReader
from tests.support.tiny import VOCAB_SIZE, tiny_tokenizer

SEQ_LEN, BATCH, LEARNING_RATE = 128, 8, 2e-3
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "output_router_logits": False,
}  # fmt: skip
MODELS = {
    "qwen3-moe": Qwen3MoeConfig(
        **COMMON, num_experts=8, moe_intermediate_size=128, intermediate_size=256, mlp_only_layers=[0]
    ),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=8, intermediate_size=128),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, quantize, check, print.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    options = _parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    start = time.perf_counter()
    for name in options.models:
        folder = options.out / name
        before, after, seconds = train(MODELS[name], options.calibration, folder, options.steps)
        print(f"{name}: training loss {before:.3f} -> {after:.3f} nats in {seconds:.0f} s", flush=True)
        for profile in options.profiles:
            for target in options.targets:
                result = study(options, folder, profile, target)
                results.append(result | {"model": name, "training_loss": [before, after]})
                print("\n".join(lines(result)), flush=True)
    (options.out / "study_experts.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0 if all(result["logit_difference"] in (0, None) for result in results) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text to train and calibrate on")
    parser.add_argument("--eval-data", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--profiles", nargs="+", default=["auto", "vllm"])
    parser.add_argument("--targets", type=float, nargs="+", default=[3.5, 4.5], help="stored bits per weight")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-samples", type=int, default=16)
    return parser.parse_args(arguments)


def train(config: Any, text: Path, folder: Path, steps: int) -> tuple[float, float, float]:
    """Train a model from scratch and save it in bfloat16.

    Returns:
        Mean loss of the first and of the last tenth of the steps, and seconds.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    characters = text.read_text(encoding="utf-8")[: steps * BATCH * SEQ_LEN]
    tokens = torch.tensor(tokenizer(characters, add_special_tokens=False, verbose=False).input_ids)
    rows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tenth = max(steps // 10, 1)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth, time.perf_counter() - start


def study(options: argparse.Namespace, model: Path, profile: str, target: float) -> dict[str, Any]:
    """Quantize one way, and what the report says of it."""
    folder = model.with_name(f"{model.name}-{profile}-{target:g}")
    shutil.rmtree(folder, ignore_errors=True)
    values: dict[str, Any] = {
        "target_bpw": target, "bits": "2,3,4,5,6,8", "group_size": 64,
        "profile": profile, "calibration": options.calibration, "eval_data": options.eval_data,
        "num_samples": options.num_samples, "seq_len": SEQ_LEN, "device": "cpu",
    }  # fmt: skip
    start = time.perf_counter()
    report = hawqtool.quantize(model, folder, **values).report
    seconds = time.perf_counter() - start
    bits = {entry["unit"]: entry["bits"] for entry in report["plan"]}
    return {
        "profile": profile,
        "target_bpw": target,
        "bpw_linears": report["sizes"]["bpw_linears"],
        "evaluation": report["evaluation"],
        "shipped": report["shipped"],
        "predicted_kl": report["predicted_loss"],
        "expert_bits": {unit: width for unit, width in bits.items() if unit.endswith("experts")},
        "experts": report["experts"],
        "fallbacks": report["fallbacks"],
        "warnings": report["warnings"],
        "logit_difference": logit_difference(model, folder) if profile == "auto" else None,
        "seconds": seconds,
    }


def logit_difference(model: Path, folder: Path) -> float:
    """Largest difference of the logits of a folder, as transformers loads it, to the original with its weights.

    Both are unpacked in the stored dtype and compute in float32.
    """
    dense = folder.with_name(f"{folder.name}-dense")
    shutil.copytree(model, dense, dirs_exist_ok=True)
    packed = PackedReader(folder)
    tensors = {name: packed.tensor(name) for name in load_file(model / "model.safetensors")}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    rows = torch.randint(3, VOCAB_SIZE, (4, 64), generator=torch.Generator().manual_seed(0))
    first, second = (_logits(place, rows) for place in (dense, folder))
    shutil.rmtree(dense)
    return float((first - second).abs().max())


def _logits(folder: Path, rows: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        model(input_ids=rows)  # a packed model unpacks itself in its first call
        # The method of nn.Module, because that of transformers refuses packed models.
        logits: Tensor = nn.Module.float(model)(input_ids=rows).logits
    return logits


def lines(result: dict[str, Any]) -> list[str]:
    """What one run showed."""
    evaluation, difference = result["evaluation"], result["evaluation"]["mixed_minus_uniform"]
    text = [
        f"  {result['profile']}, {result['bpw_linears']:.3f} bits: KL mixed {evaluation['mixed']['kl']:.2e} "
        f"(predicted {result['predicted_kl'] or float('nan'):.2e}), uniform {evaluation['uniform']['kl']:.2e} "
        f"({' '.join(evaluation['uniform']['formats'])}), difference {difference['kl']:+.1e} ± "
        f"{difference['kl_stderr']:.1e}; shipped {result['shipped']}; experts at "
        f"{sorted(set(result['expert_bits'].values()))} bits; {result['seconds']:.0f} s"
    ]
    for name, tokens in result["experts"].items():
        shares = [100 * count / sum(tokens) for count in tokens]
        text.append(
            f"    {name}: tokens per expert {min(tokens)} to {max(tokens)}, {min(shares):.1f} to {max(shares):.1f} %"
        )
    text += [f"    warning: {warning}" for warning in result["warnings"]]
    if result["logit_difference"] is not None:
        text.append(f"    loaded by transformers; largest difference of a logit {result['logit_difference']:.2g}")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
