"""Whole runs on tiny models: what each setting changes, what is refused, what a saved measurement decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hawqtool.errors import InputError, UsageError
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.allocate import run_allocate
from hawqtool.pipeline.evaluate import run_evaluate
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.runtime.reporter import Silent
from tests.support.runs import (
    BLOCK_LINEARS,
    MIXED_TARGET,
    PACKED,
    Report,
    Run,
    differing_share,
    edited,
    plan_bits,
    random_text,
    read,
    settings,
)
from tests.support.tiny import tiny_llama, tiny_model

# Settings.


def test_an_edited_plan_is_carried_out(mixed: tuple[Path, Report], run: Run, tmp_path: Path) -> None:
    widths = {"qkv_proj": 5, "o_proj": 3, "gate_up_proj": 6, "down_proj": 7}

    def change(document: dict[str, Any]) -> None:
        for entry in document["layers"]:
            entry["bits"] = widths[entry["unit"].rsplit(".", 1)[1]]

    path = edited(mixed[0] / "reproduce/plan.json", tmp_path / "plan.json", change)
    folder, report = run(plan=path)
    expected = {entry["name"]: entry["bits"] for entry in read(path)["layers"]}
    assert plan_bits(folder) == expected == {entry["name"]: entry["bits"] for entry in report["plan"]}
    assert report["shipped"] == "mixed"
    tensors = load_file(folder / "model.safetensors")
    inputs = {n: int(tensors[f"{n}.weight_shape"][1]) for n in expected}
    assert all(tensors[n + PACKED].shape[1] == -(-inputs[n] * b // 32) for n, b in expected.items())


def test_a_plan_that_splits_a_fused_unit_is_refused(mixed: tuple[Path, Report], run: Run, tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["layers"][0]["bits"] = 7

    with pytest.raises(UsageError, match="fused"):
        run(plan=edited(mixed[0] / "reproduce/plan.json", tmp_path / "plan.json", change))


def test_one_scale_per_channel(run: Run) -> None:
    folder, report = run(bits="4", target_bpw=4.5, group_size="channel")
    tensors = load_file(folder / "model.safetensors")
    scales = [t for n, t in tensors.items() if n.endswith(".weight_scale")]
    assert len(scales) == 2 * BLOCK_LINEARS
    assert all(t.shape[1] == 1 for t in scales)
    assert {entry["group_size"] for entry in report["plan"]} == {"channel"}


def test_pins_and_ignored_layers(place: Path, run: Run) -> None:
    ignored = "model.layers.0.mlp.down_proj"
    options = {"pin": ("re:.*q_proj=8",), "ignore": (ignored,)}
    folder, report = run(bits="2,3,4", target_bpw=5.0, **options)
    tensors, source = load_file(folder / "model.safetensors"), load_file(place / "model/model.safetensors")
    assert torch.equal(tensors[f"{ignored}.weight"], source[f"{ignored}.weight"])
    assert ignored not in plan_bits(folder)
    bits = plan_bits(folder)
    assert report["shipped"] == "mixed"
    assert all(bits[f"model.layers.{b}.self_attn.{m}_proj"] == 8 for b in (0, 1) for m in "qkv")
    assert verify_folder(folder, place / "model").problems == ()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"bits": "3,4", "pin": ("re:.*down_proj=2",)}, {2, 3, 4}),
        ({"bits": "2,3"}, {2, 3}),
        ({"profile": "portable"}, {4, 8}),
    ],
)
def test_a_better_uniform_plan_is_not_shipped_against_the_settings(
    run: Run, options: dict[str, Any], allowed: set[int]
) -> None:
    # A uniform plan of 6 or 7 bits fits this budget and is better than what the settings allow.
    folder, report = run(target_bpw=7.6, **options)
    bits = plan_bits(folder)
    assert set(bits.values()) <= allowed
    assert all(b == 2 for n, b in bits.items() if "pin" in options and n.endswith("down_proj"))
    assert report["evaluation"]["selection"]["mixed_minus_uniform"] > 0
    assert any("exclude it" in warning for warning in report["warnings"])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_models_and_dtypes(run: Run, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source = tiny_model(kind, tmp_path / "source", dtype=dtype, tie=True)
    folder, report = run(model=source, bits="2,3,4,8", target_bpw=5.0)
    assert verify_folder(folder, source).problems == ()
    assert report["sizes"]["bpw_linears"] <= 5.0
    assert load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    assert 0 < report["evaluation"]["mixed"]["kl"] < 1


def test_a_packed_folder_is_no_source(mixed: tuple[Path, Report], run: Run) -> None:
    with pytest.raises(InputError, match="quantized already"):
        run(bits="4", target_bpw=4.5, model=mixed[0])


def test_a_sharded_source(place: Path, run: Run, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    folder, _ = run(bits="3", target_bpw=3.5, model=source)
    whole, _ = run(bits="3", target_bpw=3.5)
    assert differing_share(whole, folder) == 0
    assert verify_folder(folder, source).problems == ()


def test_rows_sampled_from_the_model(run: Run) -> None:
    report = run(bits="4", target_bpw=4.5, calibration="self", num_samples=8, seq_len=16)[1]
    assert report["rows"]["overlap"] == 0
    assert report["rows"]["calibration"]["source"] == "self"
    assert report["rows"]["calibration"]["count"] == 8


def test_other_text_for_the_report(place: Path, run: Run) -> None:
    report = run(bits="4", target_bpw=4.5, eval_data=place / "other.txt")[1]
    assert not report["rows"]["report_in_domain"]
    assert report["rows"]["report"]["source"] == "other.txt"


def test_too_little_text_is_counted(place: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(random_text(3, 320))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"holds 10 rows of 32 tokens, 72 are needed \(16 calibration"):
        run(bits="4", target_bpw=4.5, calibration=tmp_path / "short.txt")
    assert sorted(tmp_path.iterdir()) == before


def test_repeated_text_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("ab" * 2000)
    with pytest.raises(InputError, match="occur in more than one"):
        run(bits="4", target_bpw=4.5, calibration=tmp_path / "same.txt")


# Damage and reading back.


def test_a_changed_scale_fails_verification_and_is_not_evaluated(place: Path, run: Run) -> None:
    folder, report = run(bits="4", target_bpw=4.5, eval_data=place / "other.txt")
    config = settings(place, eval_data=place / "other.txt")
    before = run_evaluate(config, folder, Silent())["quantized"]["kl"]
    assert before == pytest.approx(report["evaluation"]["mixed"]["kl"], rel=1e-6)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"][3, 0] *= 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert any("down_proj" in p for p in verify_folder(folder, place / "model").problems)
    with pytest.raises(InputError, match="down_proj: relative squared weight error"):
        run_evaluate(config, folder, Silent())


# Allocation from a file.


def allocated(place: Path, source: Path, target: Path, **overrides: Any) -> dict[str, int]:
    options = {"bits": "2,3,4,8", "target_bpw": 4.5} | overrides
    document = run_allocate(settings(place, **options), source, target)
    return {entry["unit"]: entry["bits"] for entry in document["layers"]}


def unequal_pair(bits: dict[str, int], units: dict[str, Any]) -> tuple[str, str]:
    shapes = {u: [(m["out_features"], m["in_features"]) for m in members] for u, members in units.items()}
    pairs = [(a, b) for a in bits for b in bits if shapes[a] == shapes[b] and bits[a] > bits[b]]
    assert pairs, bits
    return pairs[0]


def test_exchanged_scores_exchange_the_bits(place: Path, sensitivity: Path, tmp_path: Path) -> None:
    for target in (3.3, 3.8, 4.5, 5.0, 5.5):
        bits = allocated(place, sensitivity, tmp_path / "a.json", target_bpw=target)
        by_leaf: dict[str, set[int]] = {}
        for unit, width in bits.items():
            by_leaf.setdefault(unit.rsplit(".", 1)[1], set()).add(width)
        if any(len(found) > 1 for found in by_leaf.values()):
            break
    first, second = unequal_pair(bits, read(sensitivity)["units"])

    def exchange(document: dict[str, Any]) -> None:
        for scores in document["scores"].values():
            scores[first], scores[second] = scores[second], scores[first]

    path = edited(sensitivity, tmp_path / "s.json", exchange)
    other = allocated(place, path, tmp_path / "b.json", target_bpw=target)
    assert other == bits | {first: bits[second], second: bits[first]}


def test_a_huge_score_takes_the_top_width(place: Path, sensitivity: Path, tmp_path: Path) -> None:
    before = allocated(place, sensitivity, tmp_path / "a.json", target_bpw=4.0)
    unit = min(before, key=lambda name: before[name])
    assert before[unit] < 8

    def change(document: dict[str, Any]) -> None:
        for scores in document["scores"].values():
            scores[unit] = {label: [1e6 * v, e] for label, (v, e) in scores[unit].items()}

    path = edited(sensitivity, tmp_path / "s.json", change)
    assert allocated(place, path, tmp_path / "b.json", target_bpw=4.0)[unit] == 8


def test_saved_scores_give_the_plan_of_the_run(run: Run, place: Path, sensitivity: Path) -> None:
    """Without an evaluation the metric's own plan is shipped as it is."""
    bits = allocated(place, sensitivity, place / "again.json", target_bpw=MIXED_TARGET)
    _, report = run(bits="2,3,4,8", target_bpw=MIXED_TARGET, eval=False, eval_samples=None)
    assert bits == {entry["unit"]: entry["bits"] for entry in report["plan"]}


def test_uniform_is_shipped_when_the_scores_mislead(sensitivity: Path, run: Run, tmp_path: Path) -> None:
    def reverse(document: dict[str, Any]) -> None:
        for scores in document["scores"].values():
            for by_label in scores.values():
                values = [by_label[label] for label in sorted(by_label)]
                by_label.update(zip(sorted(by_label), reversed(values), strict=True))

    path = edited(sensitivity, tmp_path / "s.json", reverse)
    folder, report = run(bits="2,3,4,8", target_bpw=4.5, sensitivity=path)
    assert report["shipped"] == "uniform"
    assert set(plan_bits(folder).values()) == {4}
    assert any("uniform was shipped" in warning for warning in report["warnings"])
    assert report["evaluation"]["mixed"]["kl"] > report["evaluation"]["uniform"]["kl"]
    assert report["sizes"]["quantized_bytes"] == (folder / "model.safetensors").stat().st_size


def test_scores_of_another_checkpoint_are_refused(sensitivity: Path, run: Run, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", layers=3)
    with pytest.raises(UsageError, match="another checkpoint"):
        run(bits="2,3,4,8", target_bpw=4.5, sensitivity=sensitivity, model=other)


# The output folder.


def test_output_rules(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    base: dict[str, Any] = {"bits": "4", "target_bpw": 4.5, "output": output}
    for overwrite, reason in ((False, "not empty"), (True, "not made by hawqtool")):
        with pytest.raises(UsageError, match=reason):
            run_quantize(settings(place, **base, overwrite=overwrite), "", Silent(), lambda _: None)
    assert (output / "mine.txt").read_text() == "keep"


def test_overwrite_replaces_our_own_folder(place: Path, run: Run) -> None:
    folder, _ = run(bits="4", target_bpw=4.5)
    config = settings(place, bits="3", target_bpw=3.5, output=folder, overwrite=True)
    run_quantize(config, "", Silent(), lambda _: None)
    assert set(plan_bits(folder).values()) == {3}
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []
