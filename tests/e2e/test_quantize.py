"""Whole runs on tiny models: what is written, what is reported, and what must be equal between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hawqtool.errors import UsageError
from hawqtool.export.manifest import weight_hashes
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.run.files import file_hash
from hawqtool.pipeline.run.job import prepare
from hawqtool.rounding.method import BETAS
from tests.support.runs import (
    BLOCK_LINEARS,
    MIXED_TARGET,
    PACKED,
    Report,
    Run,
    differing_share,
    edited,
    plan_bits,
    read,
    settings,
)
from tests.support.tiny import tiny_llama

# The report and the files.


def test_report_has_the_documented_keys(mixed: tuple[Path, Report]) -> None:
    folder, report = mixed
    stored = read(folder / "report.json")
    assert stored["schema"] == "hawqtool.report/2"
    expected = "model hawqtool_version command config sizes plan layers rows evaluation shipped timings "
    assert set((expected + "peak_memory_bytes warnings").split()) <= set(stored)
    assert {"original_bytes", "quantized_bytes", "bpw_linears", "bpw_file"} <= set(stored["sizes"])
    assert set(stored["plan"][0]) == {"name", "unit", "bits", "group_size", "symmetric", "bytes"}
    assert {"original", "uniform", "mixed"} <= set(stored["evaluation"])
    for name in ("original", "uniform", "mixed"):
        assert {"perplexity", "kl", "kl_stderr", "same_top", "num_tokens"} <= set(stored["evaluation"][name])
    assert stored["evaluation"]["original"]["kl"] == pytest.approx(0, abs=1e-6)
    assert stored["evaluation"]["mixed"]["num_tokens"] == 8 * 32
    assert {"kl", "kl_stderr"} <= set(stored["evaluation"]["mixed_minus_uniform"])
    assert all(seconds >= 0 for seconds in stored["timings"].values())
    assert "measure" in stored["timings"] and not {"rotation", "KV cache"} & set(stored["timings"])
    assert stored["peak_memory_bytes"]["host"] > 0
    assert report["plan"] == stored["plan"]


def test_rows_are_disjoint_and_fingerprinted(mixed: tuple[Path, Report]) -> None:
    rows = mixed[1]["rows"]
    assert rows["overlap"] == 0
    assert {name: rows[name]["count"] for name in ("calibration", "scoring", "selection", "report")} == {
        "calibration": 16,
        "scoring": 16,
        "selection": 8,
        "report": 8,
    }
    assert len({rows[name]["fingerprint"] for name in ("calibration", "scoring", "selection", "report")}) == 4


def test_the_report_names_no_machine_path(place: Path, mixed: tuple[Path, Report]) -> None:
    folder = mixed[0]
    for file in [*folder.glob("*.json"), *(folder / "reproduce").iterdir()]:
        assert str(place) not in file.read_text(), file.name


def test_layers_report_their_errors(mixed: tuple[Path, Report]) -> None:
    layers = mixed[1]["layers"]
    assert len(layers) == 2 * BLOCK_LINEARS
    for metrics in layers.values():
        assert 0 < metrics["output_error"] < 1
        assert metrics["num_tokens"] == 16 * 32
        assert metrics["damping"] > 0
        assert metrics["fallback"] is None


def test_a_mixed_plan_meets_its_budget_and_is_what_the_file_holds(mixed: tuple[Path, Report]) -> None:
    folder, report = mixed
    bits = plan_bits(folder)
    assert report["shipped"] == "mixed"
    assert len(set(bits.values())) > 1
    assert 4.5 < report["sizes"]["bpw_linears"] <= MIXED_TARGET
    assert report["evaluation"]["mixed"]["kl"] < report["evaluation"]["uniform"]["kl"]
    config = read(folder / "reproduce/plan.json")
    assert {e["name"]: e["bits"] for e in report["plan"]} == bits
    assert config["bpw_linears"] == pytest.approx(report["sizes"]["bpw_linears"])
    tensors = load_file(folder / "model.safetensors")
    for name, width in bits.items():
        columns = int(tensors[f"{name}.weight_shape"][1])
        assert tensors[name + PACKED].shape[1] * 32 == columns * width
    for entry in report["plan"]:
        parts = [tensors[entry["name"] + suffix] for suffix in (PACKED, ".weight_scale")]
        assert sum(t.numel() * t.element_size() for t in parts) == entry["bytes"]


def test_sizes_equal_the_files(mixed: tuple[Path, Report]) -> None:
    folder, report = mixed
    written = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert report["sizes"]["quantized_bytes"] == written
    assert report["sizes"]["stored_bytes_linears"] == sum(e["bytes"] for e in report["plan"])


def test_hashes_and_files_of_the_folder(place: Path, mixed: tuple[Path, Report]) -> None:
    folder = mixed[0]
    assert weight_hashes(folder) == {"model.safetensors": file_hash(folder / "model.safetensors")}
    for name in ("config.yaml", "plan.json", "sensitivity.json", "checksums.json", "manifest.json", "packages.json"):
        assert (folder / "reproduce" / name).is_file()
    assert (folder / "tokenizer.json").read_bytes() == (place / "model/tokenizer.json").read_bytes()
    assert not list(place.glob(".*hawqtool*"))
    assert verify_folder(folder, place / "model").problems == ()


def test_a_dry_run_knows_the_exact_bytes(place: Path, run: Run) -> None:
    expected = describe(prepare(settings(place, bits="3", target_bpw=3.5)))
    folder, report = run(bits="3", target_bpw=3.5)
    assert expected["expected_is_exact"]
    assert expected["expected_bytes"] == (folder / "model.safetensors").stat().st_size
    assert report["sizes"]["bpw_linears"] == 3.5
    assert set(plan_bits(folder).values()) == {3}


def test_a_size_target_bounds_the_file(place: Path, run: Run) -> None:
    folder, _ = run(bits="2,3,4,8", target_size="80kB")
    assert (folder / "model.safetensors").stat().st_size <= 80_000


def test_transformers_loads_the_folder(place: Path, mixed: tuple[Path, Report]) -> None:
    pytest.importorskip("compressed_tensors")
    folder, reader = mixed[0], PackedReader(mixed[0])
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = dense(tokens).logits
        for name in plan_bits(folder):
            dense.get_submodule(name).weight.copy_(reader.tensor(f"{name}.weight"))
        expected, found = dense(tokens).logits, loaded(tokens).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 0.01 * scale
    assert float((before - expected).abs().max()) > 0.02 * scale


# Equalities between runs.


def test_the_uniform_reference_is_the_matching_single_width_run(mixed: tuple[Path, Report], run: Run) -> None:
    uniform = mixed[1]["evaluation"]["uniform"]
    assert uniform["formats"] == ["w4g32"]
    single = run(bits="4", target_bpw=4.5)[1]["evaluation"]
    assert single["mixed"]["formats"] == ["w4g32"]
    assert uniform["kl"] == single["mixed"]["kl"] == single["uniform"]["kl"]
    assert uniform["total_bytes"] == single["mixed"]["total_bytes"]


def test_the_same_run_twice_gives_the_same_files(mixed: tuple[Path, Report], run: Run) -> None:
    folder, report = run(bits="2,3,4,8", target_bpw=MIXED_TARGET)
    assert file_hash(folder / "model.safetensors") == file_hash(mixed[0] / "model.safetensors")
    assert report["evaluation"]["mixed"]["kl"] == mixed[1]["evaluation"]["mixed"]["kl"]


def test_foem_without_pull_is_gptq_and_with_pull_is_not(run: Run) -> None:
    shared: dict[str, Any] = {"bits": "3", "target_bpw": 3.5}
    gptq, still, pulled = (
        run(rounding=name, foem_beta=beta, **shared)[0] for name, beta in (("gptq", 0.1), ("foem", 0.0), ("foem", 0.1))
    )
    assert file_hash(still / "model.safetensors") == file_hash(gptq / "model.safetensors")
    assert differing_share(gptq, pulled) >= 0.01


def test_corrections_reach_the_file_and_the_report(run: Run) -> None:
    shared: dict[str, Any] = {"bits": "3", "target_bpw": 3.5}
    gptq, _ = run(target_shift="off", **shared)
    still, _ = run(rounding="gptaq", gptaq_alpha=0.0, **shared)
    assert file_hash(still / "model.safetensors") == file_hash(gptq / "model.safetensors")
    first = "layers.0.self_attn.q_proj"
    for values in ({"rounding": "gptaq"}, {"target_shift": 0.5}):
        corrected, _ = run(**shared, **values)
        # The first inputs are the original's own.
        assert differing_share(gptq, corrected, first) == 0
        assert differing_share(gptq, corrected) > 0.01
    _, report = run(rounding="foem", foem_beta="auto", target_shift="auto", scale_refit=True, **shared)
    layers = report["layers"].values()
    assert report["layers"][f"model.{first}"]["target_shift"] == 0
    assert {layer["beta"] for layer in layers} <= set(BETAS) and len({layer["beta"] for layer in layers}) > 1
    assert any(0 < layer["target_shift"] <= 1 for layer in layers)
    assert any(layer["scales_refitted"] for layer in layers) and report["fallbacks"] == 0


def test_weights_of_tokens_serve_scores_and_every_rounding(mixed: tuple[Path, Report], run: Run) -> None:
    folder, report = mixed
    assert report["timings"]["token importance"] > 0
    assert read(folder / "reproduce/sensitivity.json")["settings"]["token_importance"] == "gradient"
    plan = folder / "reproduce/plan.json"
    again, alike = run(plan=plan)[0], run(plan=plan, token_importance="none")
    assert file_hash(again / "model.safetensors") == file_hash(folder / "model.safetensors")
    assert "weigh" not in alike[1]["timings"] and differing_share(folder, alike[0]) > 0.01


def test_settings_chosen_on_held_out_rows_need_such_rows(run: Run) -> None:
    with pytest.raises(UsageError, match="found --num-samples 3; raise it to 4"):
        run(rounding="foem", foem_beta="auto", num_samples=3, bits="3", target_bpw=3.5)


def test_compensation_beats_plain_rounding(run: Run) -> None:
    errors = []
    for name in ("rtn", "gptq"):
        layers = run(rounding=name, bits="3", target_bpw=3.5)[1]["layers"]
        errors.append(sum(m["output_error"] for m in layers.values()))
    assert errors[1] < errors[0]


def test_another_seed_takes_other_rows(mixed: tuple[Path, Report], run: Run) -> None:
    report = run(bits="4", target_bpw=4.5, seed=3)[1]
    assert report["rows"]["calibration"]["fingerprint"] != mixed[1]["rows"]["calibration"]["fingerprint"]


def test_what_the_first_block_adds_reaches_the_later_ones(place: Path, run: Run, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama(tmp_path / "zeroed") / "model.safetensors")
    for leaf in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{leaf}.weight"].zero_()
    save_file(tensors, tmp_path / "zeroed/model.safetensors", {"format": "pt"})
    # Weights of tokens know of the blocks behind.
    plain, _ = run(bits="3", target_bpw=3.5, token_importance="none")
    zeroed, report = run(bits="3", target_bpw=3.5, token_importance="none", model=tmp_path / "zeroed")
    assert report["layers"]["model.layers.0.mlp.down_proj"]["weight_error"] == 0
    assert differing_share(plain, zeroed, "layers.0.self_attn.q_proj") == 0
    assert differing_share(plain, zeroed, "layers.1") > 0.01


def test_later_codes_depend_on_how_earlier_blocks_were_rounded(mixed: tuple[Path, Report], run: Run) -> None:
    source = mixed[0] / "reproduce/plan.json"
    folders = []
    for bits in (2, 8):

        def change(document: dict[str, Any], bits: int = bits) -> None:
            for entry in document["layers"]:
                entry["bits"] = bits if ".0." in entry["name"] else 4

        folders.append(run(plan=edited(source, mixed[0].parent / f"plan{bits}.json", change))[0])
    assert differing_share(*folders, "layers.1") > 0.01
