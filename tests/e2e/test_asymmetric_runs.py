"""Whole runs with asymmetric grids: what is written, read back by compressed-tensors itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from hawqtool.errors import InputError, UsageError
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.run.job import prepare
from tests.support.runs import Report, Run, edited, plan_bits, read, settings

Asymmetric = tuple[Path, Report]
KIND: dict[str, Any] = {"symmetric": False, "profile": "vllm"}


@pytest.fixture
def asymmetric(run: Run) -> Asymmetric:
    return run(bits="2,3,4,8", target_bpw=5.5, **KIND)


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the packed modules as compressed-tensors computes them from our config and files."""
    tensors, config = load_file(folder / "model.safetensors"), read(folder / "config.json")["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups
    weights = {}
    for entry in read(folder / "reproduce/plan.json")["layers"]:
        prefix = entry["name"] + "."
        size = "ch" if entry["group_size"] == "channel" else f"g{entry['group_size']}"
        scheme = groups[f"w{entry['bits']}{size}" + ("" if entry["symmetric"] else "a")]
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        assert ("weight_zero_point" in state) == (not entry["symmetric"])
        weights[entry["name"]] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return weights


def assert_reads_back(folder: Path) -> None:
    reader = PackedReader(folder)
    for name, weight in decompressed(folder).items():
        ours = reader.tensor(f"{name}.weight")
        assert ours.dtype == weight.dtype == torch.bfloat16
        assert torch.equal(ours.view(torch.int16), weight.contiguous().view(torch.int16))


def test_a_mixed_asymmetric_run(place: Path, asymmetric: Asymmetric) -> None:
    folder, report = asymmetric
    assert len(set(plan_bits(folder).values())) > 1
    assert report["sizes"]["bpw_linears"] <= 5.5
    assert report["config"]["symmetric"] is False
    assert {e["symmetric"] for e in report["plan"]} == {False}
    assert read(folder / "reproduce/sensitivity.json")["symmetric"] is False
    for name in ("mixed", "uniform"):
        assert all(label.endswith("a") for label in report["evaluation"][name]["formats"])
    assert all(0 < metrics["output_error"] < 1 for metrics in report["layers"].values())
    assert verify_folder(folder, place / "model").problems == ()
    assert_reads_back(folder)
    tensors = load_file(folder / "model.safetensors")
    for entry in report["plan"]:
        parts = [tensors[f"{entry['name']}.weight_{part}"] for part in ("packed", "scale", "zero_point")]
        assert sum(t.numel() * t.element_size() for t in parts) == entry["bytes"]
    assert report["sizes"]["stored_bytes_linears"] == sum(e["bytes"] for e in report["plan"])
    assert report["sizes"]["quantized_bytes"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "foem"])
def test_the_dry_run_knows_the_bytes_and_errors_are_smaller(place: Path, run: Run, rounding: str) -> None:
    # 64 or 128 rows of 3 bits fill whole words: a zero point adds 3 bits per 32 weights to the 3.5 of codes and scales.
    target = 3.5 + 3 / 32
    options: dict[str, Any] = {"bits": "3", "target_bpw": target, "rounding": rounding}
    expected = describe(prepare(settings(place, **options, **KIND)))
    folder, report = run(**options, **KIND)
    assert expected["expected_is_exact"] and not expected["symmetric"]
    assert expected["best_uniform"] == "w3g32a"
    assert expected["expected_bytes"] == (folder / "model.safetensors").stat().st_size
    assert report["sizes"]["bpw_linears"] == target
    symmetric = run(**options)[1]
    errors = [sum(m["output_error"] for m in r["layers"].values()) for r in (report, symmetric)]
    assert errors[0] < errors[1]


def test_a_size_target_counts_zero_points(run: Run) -> None:
    folder, _ = run(bits="2,3,4,8", target_size="84kB", **KIND)
    assert (folder / "model.safetensors").stat().st_size <= 84_000


def test_pins_and_profile_transformers(run: Run) -> None:
    options = KIND | {"profile": "transformers"}
    folder, report = run(bits="4", target_bpw=5.5, pin=["re:.*down_proj=6"], **options)
    formats = {e["name"]: (e["bits"], e["symmetric"]) for e in read(folder / "reproduce/plan.json")["layers"]}
    assert {f for n, f in formats.items() if n.endswith("down_proj")} == {(6, False)}
    assert any("transformers 5.17" in warning for warning in report["warnings"])


def test_a_plan_of_both_kinds(place: Path, asymmetric: Asymmetric, run: Run, tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for entry in document["layers"]:
            entry["symmetric"] = ".0." in entry["name"]

    def damage(document: dict[str, Any]) -> None:
        document["layers"][0]["symmetric"] = "no"

    plan = asymmetric[0] / "reproduce/plan.json"
    with pytest.raises(InputError, match="symmetric 'no', expected true or false"):
        run(plan=edited(plan, tmp_path / "damaged.json", damage), profile="vllm")
    path = edited(plan, tmp_path / "plan.json", change)
    with pytest.raises(UsageError, match=r"layers\.1\..* is asymmetric; profile auto takes symmetric grids only"):
        run(plan=path)
    folder, report = run(plan=path, profile="vllm")
    assert {e["name"].split(".")[2]: e["symmetric"] for e in report["plan"]} == {"0": True, "1": False}
    assert verify_folder(folder, place / "model").problems == ()
    assert_reads_back(folder)
