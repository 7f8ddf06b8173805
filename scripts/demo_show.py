"""Show a quantized folder: the table of its report, and how both models go on with fixed prompts.

Only files are read: the report of the folder, and both checkpoints through transformers.

    python scripts/demo_show.py FOLDER MODEL [--no-table]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hawqtool.cli.render import print_report

PROMPTS = ("The capital of France is", "Plants need sunlight because", "def is_even(number):")
NEW_TOKENS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description="Show a quantized folder beside its original.")
    parser.add_argument("folder", type=Path, help="folder that hawqtool wrote")
    parser.add_argument("model", type=Path, help="folder of the original")
    parser.add_argument("--no-table", action="store_true", help="leave the table of the report out")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not options.no_table:
        report = json.loads((options.folder / "report.json").read_text(encoding="utf-8"))
        print_report(with_nan(report), str(options.folder), sum(report["timings"].values()))
    original, quantized = continuations(options.model), continuations(options.folder)
    print(f"\nGreedy continuations, {NEW_TOKENS} tokens")
    for prompt, before, after in zip(PROMPTS, original, quantized, strict=True):
        print(f"\n  {prompt}")
        print(f"    original:  {before}")
        print(f"    quantized: {after}")
    return 0


def with_nan(value: Any) -> Any:
    """A report as the renderer takes it: a standard error that JSON holds as null is NaN again."""
    if isinstance(value, dict):
        return {
            name: float("nan") if name == "kl_stderr" and item is None else with_nan(item)
            for name, item in value.items()
        }
    return [with_nan(item) for item in value] if isinstance(value, list) else value


@torch.no_grad()
def continuations(folder: Path) -> list[str]:
    """Load a folder with transformers and let it continue each prompt.

    Args:
        folder: Checkpoint; a packed one is unpacked by compressed-tensors.

    Returns:
        One line per prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # compressed-tensors draws a bar on stderr and offers no switch; exceptions still come through.
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    tokens = model.eval().generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [str(text).replace("\n", "\\n") for text in texts]


if __name__ == "__main__":
    sys.exit(main())
