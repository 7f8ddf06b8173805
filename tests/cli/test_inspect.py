"""``hawqtool inspect``: originals, quantized folders, models that are refused, and folders that are no checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hawqtool.cli.app import app
from hawqtool.config import RunConfig
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.run.job import prepare
from hawqtool.report.wording import role, starred
from tests.support.packed_folder import write_packed
from tests.support.tiny import tiny_llama, tiny_model

BLOCK_WEIGHTS = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("inspect") / "model")


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    """A quantized folder of many formats without report.json."""
    write_packed(model, model.parent / "packed")
    (model.parent / "packed/report.json").unlink()
    return model.parent / "packed"


def invoke(*arguments: object) -> Result:
    # Wide enough that no cell is folded.
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})


def described(folder: Path) -> dict[str, Any]:
    result = invoke(folder, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert isinstance(document, dict) and document["schema"] == "hawqtool.inspect/1"
    return document


def edited_config(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


# Originals.


def test_an_original(model: Path) -> None:
    found = described(model)
    assert (found["kind"], found["supported"], found["refusal"]) == ("original", True, None)
    assert (found["architectures"], found["model_type"]) == (["LlamaForCausalLM"], "llama")
    tensors = load_file(model / "model.safetensors")
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["bytes"] == (model / "model.safetensors").stat().st_size
    assert found["dtypes"]["BF16"]["tensors"] == found["tensors"] == len(tensors)
    assert found["blocks"] == 2
    assert found["quantizable_weights"] == 2 * BLOCK_WEIGHTS
    roles = {entry["role"]: entry for entry in found["roles"]}
    assert list(roles)[0] == "self_attn.q_proj" and len(roles) == 7
    assert roles["self_attn.k_proj"]["shape"] == [32, 64] and roles["self_attn.k_proj"]["count"] == 2
    assert roles["mlp.down_proj"]["group_sizes"] == [128, 64, 32]
    assert roles["mlp.up_proj"]["group_sizes"] == [64, 32]
    assert sum(entry["share"] for entry in roles.values()) == pytest.approx(2 * BLOCK_WEIGHTS / found["parameters"])
    units = {entry["unit"]: entry for entry in found["units"]}
    assert units["self_attn.qkv_proj"]["members"] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    (pattern,) = found["input_groups"]
    assert pattern["blocks"] == 2
    assert [(group["members"], group["count"]) for group in pattern["groups"]] == [
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 1),
        (["self_attn.o_proj"], 1),
        (["mlp.gate_proj", "mlp.up_proj"], 1),
        (["mlp.down_proj"], 1),
    ]
    kept = found["unquantized"]
    assert kept["embeddings"] == kept["head"] == 128 * 64 * 2
    assert sum(kept.values()) == 2 * (found["parameters"] - found["quantizable_weights"])


def test_sizes_are_those_of_the_writer(model: Path, tmp_path: Path) -> None:
    sizes = {entry["format"]: entry for entry in described(model)["uniform"]}
    assert set(sizes) == {f"w{bits}g{size}" for bits in (2, 3, 4, 8) for size in (32, 64, 128)}
    assert (sizes["w3g32"]["bpw_linears"], sizes["w3g32"]["units_in_smaller_groups"]) == (3.5, 0)
    # All but the two down projections have 64 inputs.
    assert sizes["w3g128"]["units_in_smaller_groups"] == 6
    config = RunConfig(
        model=str(model),
        bits="3",
        group_size=32,
        target_bpw=3.5,
        foem_beta=0.1,
        damping=None,
        batch_size=None,
        seed=0,
    )
    assert describe(prepare(config))["expected_bytes"] == sizes["w3g32"]["bytes"]


def test_a_tied_head_and_shards(tmp_path: Path) -> None:
    found = described(tiny_model("qwen2", tmp_path / "model", tie=True, max_shard_size=60_000))
    assert found["files"] > 1
    assert "head" not in found["unquantized"]
    # Qwen2 has biases at q, k and v.
    assert found["unquantized"]["norms and biases"] == 2 * (5 * 64 + 2 * (64 + 32 + 32))


def test_inputs_that_no_group_divides(tmp_path: Path) -> None:
    found = described(tiny_llama(tmp_path / "model", hidden_size=48, intermediate_size=80))
    assert found["supported"]
    assert [entry["format"] for entry in found["uniform"]] == ["w2ch", "w3ch", "w4ch", "w8ch"]
    assert all(entry["group_sizes"] == [] for entry in found["roles"])
    assert "whole rows only" in invoke(tmp_path / "model").stdout


def test_an_original_for_people(model: Path) -> None:
    shown = invoke(model)
    assert shown.exit_code == 0 and shown.stderr == ""
    for part in ("LlamaForCausalLM", "2 blocks, 14 linears in 8 units", "mlp.down_proj", "w4g64", "embeddings 16,384"):
        assert part in shown.stdout


# What is refused.


def test_a_refused_model_tells_what_its_headers_hold(model: Path, tmp_path: Path) -> None:
    folder = edited_config(model, tmp_path / "other", lambda c: c.update(model_type="nobody_knows", architectures=None))
    found = described(folder)
    assert (found["kind"], found["supported"]) == ("original", False)
    assert "does not know model type" in found["refusal"]
    matrices = {entry["name"]: entry for entry in found["matrices"]}
    assert matrices["model.layers.*.mlp.up_proj.weight"]["count"] == 2
    assert matrices["model.layers.*.mlp.up_proj.weight"]["shape"] == [128, 64]
    assert "blocks" not in found
    shown = invoke(folder)
    assert shown.exit_code == 0
    assert "model.layers.*.mlp.up_proj.weight" in shown.stdout and "refused" in shown.stdout


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x\x1b[31m[bold]y"}))
    save_file({"[red]a.3.b": torch.zeros(2, 2)}, folder / "model.safetensors")
    shown = invoke(folder)
    assert shown.exit_code == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    assert "[red]a.*.b" in shown.stdout and "[bold]y" in shown.stdout
    save_file({"\x1b]0;title\x07a.3.b": torch.zeros(2, 2)}, folder / "model.safetensors")
    refused = invoke(folder)
    assert refused.exit_code == 4 and "\x1b" not in refused.stderr and "\x07" not in refused.stderr


@pytest.mark.parametrize("case", ["missing", "empty", "no weights", "broken", "not an object"])
def test_what_is_no_checkpoint_exits_4(tmp_path: Path, model: Path, case: str) -> None:
    folder = tmp_path / "folder"
    if case != "missing":
        folder.mkdir()
    if case == "no weights":
        (folder / "config.json").write_text("{}")
    if case in ("broken", "not an object"):
        shutil.copyfile(model / "model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text("{" if case == "broken" else "[]")
    result = invoke(folder, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["exit_code"] == 4
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


# Quantized folders.


def test_a_quantized_folder(model: Path, packed: Path) -> None:
    found = described(packed)
    assert (found["kind"], found["supported"], found["format"]) == ("quantized", True, "pack-quantized")
    original = described(model)
    assert found["parameters"] == original["parameters"]
    sizes = found["sizes"]
    assert sizes["quantized_weights"] == 2 * BLOCK_WEIGHTS
    assert sizes["bpw_linears"] == 8 * sizes["stored_bytes_linears"] / (2 * BLOCK_WEIGHTS)
    assert sizes["bpw_file"] == 8 * found["bytes"] / found["parameters"]
    assert sizes["unquantized_bytes"] == sum(original["unquantized"].values())
    plan = json.loads((packed / "reproduce/plan.json").read_text())["layers"]
    assert {entry["bits"]: entry["linears"] for entry in found["bits"]} == {
        bits: sum(layer["bits"] == bits for layer in plan) for bits in {layer["bits"] for layer in plan}
    }
    assert sum(entry["bytes"] for entry in found["bits"]) == sum(layer["bytes"] for layer in plan)
    roles = {entry["role"]: entry for entry in found["roles"]}
    assert roles["mlp.up_proj"]["shape"] == [128, 64]
    assert sum(roles["mlp.up_proj"]["formats"].values()) == 2
    assert {e["engine"]: e["loads"] for e in found["engines"]}["vLLM (CPU)"] is False
    assert found["recorded"] is None and "no report.json" in found["recorded_note"]


def test_a_quantized_folder_for_people(packed: Path) -> None:
    shown = invoke(packed)
    assert shown.exit_code == 0
    for part in ("4 bit ", "█", "self_attn.o_proj", "SGLang", "not run here", "no report.json"):
        assert part in shown.stdout, part


def test_method_and_quality_come_from_the_report(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=1200)))
    rows = ("--num-samples", "8", "--seq-len", "16", "--device", "cpu", "--eval-samples", "4", "--calibration", text)
    command = ("quantize", model, "-o", tmp_path / "out", "--target-bpw", "4.5", "--group-size", "32", "--bits", "4")
    done = CliRunner().invoke(app, [str(a) for a in (*command, *rows, "--json", "--quiet")])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    found = described(tmp_path / "out")
    assert found["recorded"]["evaluation"]["quantized"]["kl"] == report["evaluation"]["uniform"]["kl"]
    assert found["recorded"]["rounding"] == "gptq" and found["recorded_note"] is None
    assert found["sizes"]["bpw_linears"] == report["sizes"]["bpw_linears"] == 4.5
    assert found["sizes"]["bpw_file"] == report["sizes"]["bpw_file"]
    assert found["engines"] == report["engines"]
    assert "same top-1" in invoke(tmp_path / "out").stdout
    for damaged, said in (("{}", "schema"), ('{"schema": "hawqtool.report/2"}', "damaged"), ("{", "not valid JSON")):
        (tmp_path / "out/report.json").write_text(damaged)
        found = described(tmp_path / "out")
        assert found["supported"] and found["recorded"] is None and said in found["recorded_note"]


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq (bits 4, group_size 128)"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"bits": 4}, "does not name"),
        ([], "does not name"),
    ],
)
def test_other_methods_are_named(model: Path, tmp_path: Path, quantization: Any, said: str) -> None:
    folder = edited_config(model, tmp_path / "other", lambda c: c.update(quantization_config=quantization))
    found = described(folder)
    assert (found["kind"], found["supported"]) == ("other", False)
    assert said in found["refusal"] and "does not read" in found["refusal"]
    assert invoke(folder).exit_code == 0


def test_compressed_tensors_in_another_form(model: Path, packed: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        group = next(iter(config["quantization_config"]["config_groups"].values()))
        group["weights"]["symmetric"] = False

    found = described(edited_config(packed, tmp_path / "asymmetric", change))
    assert (found["kind"], found["supported"]) == ("quantized", False)
    assert "symmetric" in found["refusal"]
    method = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    found = described(edited_config(model, tmp_path / "fp8", lambda c: c.update(quantization_config=method)))
    assert not found["supported"] and "float-quantized" in found["refusal"]


def test_names_lose_their_place() -> None:
    assert starred("model.layers.10.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert role("model.layers.10.mlp.experts.3.w1") == "mlp.experts.*.w1"
    assert role("h.0.attn.c_attn") == "attn.c_attn"
    assert role("classifier") == "classifier" and role("0") == "*"
    assert starred("conv1d.2nd.v2") == "conv1d.2nd.v2"
