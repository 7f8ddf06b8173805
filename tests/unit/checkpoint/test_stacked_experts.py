"""Stacked experts of a checkpoint, seen and quantized one by one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hawqtool
from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.checkpoint.stacked_experts import split_stacked
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.run import job
from tests.support.tiny_zoo import kind_named, save_kind

COUNT, WIDTH, INNER = 3, 8, 5
_ONE = re.compile(r"^(.*experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def checkpoint(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def stack(folder: Path) -> None:
    """Rewrite a folder with the experts of every layer in two tensors."""
    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if match := _ONE.match(name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            tensors[name] = tensor
    for name, parts in experts.items():
        numbers = range(1 + max(number for number, _ in parts))
        joined = [torch.cat([parts[n, "gate"], parts[n, "up"]]) for n in numbers]
        tensors[f"{name}.gate_up_proj"] = torch.stack(joined)
        tensors[f"{name}.down_proj"] = torch.stack([parts[n, "down"] for n in numbers])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_parts_are_those_of_the_stacked_tensors(tmp_path: Path) -> None:
    gate_up, down = torch.randn(COUNT, 2 * INNER, WIDTH), torch.randn(COUNT, WIDTH, INNER)
    folder = checkpoint(
        tmp_path, {"m.experts.gate_up_proj": gate_up, "m.experts.down_proj": down, "x": down[0].clone()}
    )
    index = split_stacked(read_index(folder), lambda _: True)
    assert len(index.tensors) == 3 * COUNT + 1
    reader = TensorReader(index)
    for number in range(COUNT):
        gate, up = gate_up[number].chunk(2)
        for role, expected in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[number])):
            assert torch.equal(reader.tensor(f"m.experts.{number}.{role}.weight"), expected)
    assert split_stacked(read_index(folder), lambda name: name != "m.experts") == read_index(folder)


@pytest.mark.parametrize("change", ["transposed", "biased", "alone"])
def test_other_layouts_stay(tmp_path: Path, change: str) -> None:
    tensors = {
        "experts.gate_up_proj": torch.randn(COUNT, 2 * INNER, WIDTH),
        "experts.down_proj": torch.randn(COUNT, WIDTH, INNER),
    }
    if change == "transposed":
        tensors = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items()}
    elif change == "biased":
        tensors["experts.down_proj_bias"] = torch.randn(COUNT, WIDTH)
    else:
        del tensors["experts.down_proj"]
    index = read_index(checkpoint(tmp_path, tensors))
    assert split_stacked(index, lambda _: True) == index


def test_a_stacked_checkpoint_gives_the_weights_of_the_same_one_by_one(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the quick brown fox jumps over the lazy dog, " * 300)
    (tmp_path / "others.txt").write_text("pack my box with five dozen liquor jugs; " * 300)
    settings = {"bits": [4], "target_bpw": 4.5, "group_size": 32, "num_samples": 6, "seq_len": 32, "eval_samples": 2}
    rows = {"calibration": str(texts), "eval_data": str(tmp_path / "others.txt"), "device": "cpu"}
    found = []
    for name in ("single", "stacked"):
        folder = save_kind(kind_named("qwen3-moe"), tmp_path / name)
        if name == "stacked":
            stack(folder)
        hawqtool.quantize(folder, tmp_path / f"{name}-out", **settings, **rows)
        assert verify_folder(tmp_path / f"{name}-out", against=folder).problems == ()
        found.append(load_file(tmp_path / f"{name}-out" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_experts_that_transformers_cannot_join_are_refused_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_kind(kind_named("qwen3-moe"), tmp_path / "m")
    monkeypatch.setattr(job, "joins_experts", lambda _: False)
    job.prepare(RunConfig(model=str(folder), group_size=32, device="cpu"))  # stored one by one: nothing to join
    stack(folder)
    with pytest.raises(InputError, match="no rule that joins"):
        job.prepare(RunConfig(model=str(folder), group_size=32, device="cpu"))
    written = job.prepare(RunConfig(model=str(folder), group_size=32, device="cpu", profile="vllm"))
    assert written.structure.obstacle is not None
