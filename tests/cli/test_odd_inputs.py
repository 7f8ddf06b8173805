"""Unusual inputs that are right: each is quantized, verified and evaluated like any other."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hawqtool.cli.app import app
from tests.support.tiny import tiny_llama, tiny_model

ROWS = ("--seq-len", "16", "--device", "cpu")
GROUP = ("--group-size", "32")
TARGET = ("--bits", "4", "--target-bpw", "6")


def run(*arguments: object) -> str:
    """Output of a command that ends well."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def channel(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder, hidden_size=72, intermediate_size=100, num_key_value_heads=4, head_dim=18)
    return ("--group-size", "channel")


def undivided_layer_ignored(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder, intermediate_size=100)
    return (*GROUP, "--ignore", "re:.*down_proj")


def odd_groups(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder, hidden_size=48, intermediate_size=96, num_key_value_heads=4, head_dim=12)
    return ("--group-size", "48", "--profile", "transformers")


def nan_in_config(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder)
    edit(folder / "config.json", training_loss=float("nan"), nested={"losses": [float("inf"), float("nan")]})
    return GROUP


def tuples(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder)
    edit(folder / "config.json", return_dict=False)
    return (*GROUP, "--calibration", "self")


def draft_head(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder)
    rename(folder, lambda t: t | {n.replace("model.", "mtp.", 1): v.clone() for n, v in t.items() if ".layers.0" in n})
    return GROUP


def bare_keys(folder: Path) -> tuple[str, ...]:
    tiny_model("qwen3", folder, tie=True)
    rename(folder, lambda t: {name.removeprefix("model."): value for name, value in t.items()})
    return GROUP


def narrow_member(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder, num_attention_heads=8, num_key_value_heads=1, head_dim=8)
    return GROUP


def index_of_too_much(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = [*load_file(folder / "model-1.safetensors"), "model.rotary_emb.inv_freq"]
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return GROUP


def recipes_of_others(folder: Path) -> tuple[str, ...]:
    tiny_llama(folder)
    return (*GROUP, "--ignore", "lm_head")


@pytest.mark.parametrize(
    "make",
    [
        channel, undivided_layer_ignored, odd_groups, nan_in_config, tuples, draft_head, bare_keys, narrow_member,
        index_of_too_much, recipes_of_others,
    ],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_an_unusual_input_goes_through(tmp_path: Path, make: Callable[[Path], tuple[str, ...]]) -> None:
    model, out, text = tmp_path / "model", tmp_path / "out", tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=4000)))
    given = make(model)
    source = () if "--calibration" in given else ("--calibration", text)
    run("quantize", model, "-o", out, *TARGET, *given, *source, *ROWS, "--num-samples", 8, "--eval-samples", 4)
    run("verify", out, "--against", model)
    evaluated = json.loads(run("evaluate", out, "--against", model, "--eval-data", text, *ROWS, "--json", "--quiet"))
    assert 0 < evaluated["quantized"]["kl"] < 1
    loaded = AutoModelForCausalLM.from_pretrained(out)
    loaded.config.return_dict = True
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()
