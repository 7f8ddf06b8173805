"""Runs on quantized originals give what runs on the dequantized folder give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hawqtool.cli.render import announcement
from hawqtool.export.manifest import file_hash
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.inspection.checkpoint import run_inspect
from hawqtool.pipeline.run.job import prepare
from tests.support.quantized_originals import FORMATS, quantized_pair
from tests.support.runs import Run, read, settings
from tests.support.tiny import tiny_llama

UNIFORM: dict[str, Any] = {"bits": "4", "target_bpw": 4.5, "num_samples": 4, "eval_samples": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    return tiny_llama(folder, layers=1, hidden_size=192, intermediate_size=320)


@pytest.mark.parametrize("name", ["fp8-e8m0", "fp8-tensor", "mxfp4", "nvfp4-modelopt", "int3-asymmetric"])
def test_the_result_is_that_of_the_dequantized_folder(dense: Path, run: Run, tmp_path: Path, name: str) -> None:
    quantized, plain = quantized_pair(dense, tmp_path, name)
    folder, report = run(model=quantized, **UNIFORM)
    wanted, other = run(model=plain, **UNIFORM)
    assert file_hash(folder / "model.safetensors") == file_hash(wanted / "model.safetensors")
    assert read(folder / "config.json") == read(wanted / "config.json")
    assert verify_folder(folder, quantized).problems == () == verify_folder(folder, plain).problems
    assert report["source_format"] == FORMATS[name][2] and other["source_format"] is None
    assert any(f"source: {FORMATS[name][2]}, dequantized on reading" in text for text in report["warnings"])
    assert report["evaluation"]["uniform"]["kl"] == other["evaluation"]["uniform"]["kl"]


def test_what_the_source_left_in_16_bits_is_kept(dense: Path, place: Path, run: Run, tmp_path: Path) -> None:
    quantized, _ = quantized_pair(dense, tmp_path, "fp8-blocks", kept=("self_attn",))
    folder, report = run(model=quantized, **UNIFORM)
    written = load_file(folder / "model.safetensors")
    assert {entry["name"].rpartition(".")[2] for entry in report["plan"]} == {"gate_proj", "up_proj", "down_proj"}
    assert "model.layers.0.self_attn.q_proj.weight" in written
    assert "model.layers.0.self_attn.q_proj" in read(folder / "config.json")["quantization_config"]["ignore"]
    assert verify_folder(folder, quantized).problems == ()
    said = "\n".join(announcement(describe(prepare(settings(place, model=quantized, **UNIFORM)))))
    assert "source      FP8 blocks 128x128, dequantized on reading" in said
    assert "kept        model.layers.0.self_attn.qkv_proj and 1 more, which the source left in 16 bits" in said
    pinned = describe(prepare(settings(place, model=quantized, pin="re:.*self_attn.*=4", **UNIFORM)))
    assert pinned["left_unquantized"] == [] and pinned["units"] == 4


def test_a_changed_weight_shows_against_the_source(dense: Path, run: Run, tmp_path: Path) -> None:
    quantized, _ = quantized_pair(dense, tmp_path, "fp8-blocks")
    other, _ = quantized_pair(
        tiny_llama(tmp_path / "other", layers=1, hidden_size=192, intermediate_size=320, seed=1),
        tmp_path / "pair",
        "fp8-blocks",
    )
    folder, _ = run(model=quantized, **UNIFORM)
    assert any("differs from the source" in problem for problem in verify_folder(folder, other).problems)


def test_inspect_names_the_format(dense: Path, tmp_path: Path) -> None:
    quantized, _ = quantized_pair(dense, tmp_path, "fp8-blocks")
    found = run_inspect(str(quantized))
    assert (found["kind"], found["supported"], found["source_format"]) == ("original", True, "FP8 blocks 128x128")
    assert {entry["role"] for entry in found["roles"]} >= {"mlp.down_proj", "self_attn.q_proj"}
    packed, _ = quantized_pair(dense, tmp_path / "packed", "int4")
    assert run_inspect(str(packed))["source_format"] == "INT4 groups of 32"
