"""Stacked experts of a checkpoint, seen and quantized one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hawqtool
from hawqtool.checkpoint.index import ExpertStack, read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.checkpoint.stacked_experts import split_stacked
from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.export.verify import verify_folder
from hawqtool.model.kept import EXPERTS
from hawqtool.model.stored_names import UNJOINED
from hawqtool.pipeline.run import job
from tests.support.runs import random_text
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


def part(whole: Tensor, transposed: bool, concatenated: bool, place: int) -> Tensor:
    rows = whole.t() if transposed else whole
    return rows.chunk(2)[place] if concatenated else rows[place::2]


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_parts_are_those_of_the_stacked_tensors(tmp_path: Path, transposed: bool, concatenated: bool) -> None:
    gate_up, down = torch.randn(COUNT, 2 * INNER, WIDTH), torch.randn(COUNT, WIDTH, INNER)
    bias = torch.randn(COUNT, 2 * INNER)
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    tensors = {"m.experts.gate_up_proj": gate_up, "m.experts.down_proj": down, "m.experts.gate_up_proj_bias": bias}
    both, order = ("gate_proj", "up_proj"), (transposed, concatenated)
    stacks = {
        "m.experts.gate_up_proj": ExpertStack("m.experts", both, *order, "weight"),
        "m.experts.down_proj": ExpertStack("m.experts", ("down_proj",), *order, "weight"),
        "m.experts.gate_up_proj_bias": ExpertStack("m.experts", both, False, concatenated, "bias"),
    }
    stored = read_index(checkpoint(tmp_path, tensors | {"x": down[0].clone()}))
    reader = TensorReader(split_stacked(stored, stacks))
    assert len(reader.index.tensors) == 5 * COUNT + 1
    for number in range(COUNT):
        expected = {"down_proj.weight": down[number].t() if transposed else down[number]}
        for place, name in enumerate(both):
            expected[f"{name}.weight"] = part(gate_up[number], *order, place)
            expected[f"{name}.bias"] = part(bias[number], False, concatenated, place)
        for name, tensor in expected.items():
            stored_name = f"m.experts.{number}.{name}"
            assert torch.equal(reader.tensor(stored_name), tensor)
            assert b"".join(reader.chunks(stored_name)) == tensor.contiguous().numpy().tobytes()
    assert split_stacked(stored, {}) == stored


@pytest.mark.parametrize("shape", [(COUNT, 2 * INNER), (COUNT, 2 * INNER + 1, WIDTH)])
def test_tensors_of_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = read_index(checkpoint(tmp_path, {"experts.gate_up_proj": torch.randn(shape)}))
    stack = ExpertStack("experts", ("gate_proj", "up_proj"), False, True, "weight")
    with pytest.raises(InputError, match=r"experts\.gate_up_proj has shape"):
        split_stacked(stored, {"experts.gate_up_proj": stack})


def test_a_stacked_checkpoint_gives_the_weights_of_the_same_one_by_one(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(random_text(1, 12000))
    (tmp_path / "others.txt").write_text(random_text(2, 4000))
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


def test_experts_that_transformers_reads_stacked_only_stay_so(tmp_path: Path) -> None:
    folder = save_kind(kind_named("granite-moe"), tmp_path / "m")
    kept = job.prepare(RunConfig(model=str(folder), group_size=32, device="cpu"))
    assert not any(".experts." in linear for linear in kept.structure.linears)
    rows = [tensor for tensor in kept.structure.kept if tensor.reason.startswith(EXPERTS)]
    assert {tensor.dimensions for tensor in rows} == {3}
    assert all("--profile vllm quantizes them" in tensor.reason for tensor in rows)
    # vLLM asks for the format of the first expert's linears, and refuses a layer for which nothing answers.
    assert "model.layers.1.block_sparse_moe.experts.0.gate_proj" in kept.unquantized_linears
    written = job.prepare(RunConfig(model=str(folder), group_size=32, device="cpu", profile="vllm"))
    assert written.structure.obstacle == UNJOINED
    assert any(".experts.0.down_proj" in linear for linear in written.structure.linears)


def test_granite_gets_the_names_that_its_engine_looks_for(tmp_path: Path) -> None:
    folder = save_kind(kind_named("granite-moe"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    found = job.prepare(RunConfig(model=str(folder), group_size=32, device="cpu", profile="vllm")).structure.linears
    assert {n.rpartition(".")[2] for n in found if ".experts.0." in n} == {"w1", "w2", "w3"}
    assert found["model.layers.0.block_sparse_moe.experts.0.w3"].module_name.endswith("experts.0.up_proj")


def test_ignored_experts_are_refused_where_transformers_would_not_load_them(tmp_path: Path) -> None:
    folder = save_kind(kind_named("mixtral"), tmp_path)
    values = {"ignore": ["model.layers.*.block_sparse_moe.experts"], "group_size": 32, "device": "cpu"}
    with pytest.raises(UsageError, match="only if all of them are packed"):
        job.prepare(RunConfig(model=str(folder), **values))
    values["ignore"] = [f"model.layers.{block}.block_sparse_moe.experts" for block in (0, 1)]
    walked = job.prepare(RunConfig(model=str(folder), profile="vllm", **values))
    assert not walked.settings.method.needs_drift  # experts are walked through, with other tokens after rounding
