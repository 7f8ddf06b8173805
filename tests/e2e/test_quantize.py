"""Whole runs on tiny models: what is written, what is reported, and what a change of settings changes."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.export.packed import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.allocating import run_allocate
from hawqtool.pipeline.dryrun import describe
from hawqtool.pipeline.evaluating import run_evaluate
from hawqtool.pipeline.job import prepare
from hawqtool.pipeline.measuring import run_measure
from hawqtool.pipeline.progress import Silent
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.reporting import file_hash
from tests.tiny import tiny_llama, tiny_model

Report = dict[str, Any]
Run = Callable[..., tuple[Path, Report]]
LETTERS = string.ascii_lowercase[:12]
BLOCK_LINEARS = 7
PACKED = ".weight_packed"
MIXED_TARGET = 5.0
"""Leaves room above w4g32, the best uniform plan that fits, so that a mixed plan is better and shipped."""


def random_text(seed: int, length: int) -> str:
    generator = random.Random(seed)
    words = ("".join(generator.choices(LETTERS, k=generator.randint(1, 7))) for _ in range(length // 3))
    return " ".join(words)[:length]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two texts and the source model."""
    folder = tmp_path_factory.mktemp("e2e")
    (folder / "text.txt").write_text(random_text(1, 4000))
    (folder / "other.txt").write_text(random_text(2, 1000))
    tiny_llama(folder / "model")
    return folder


def settings(place: Path, **overrides: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": str(place / "model"),
        "calibration": str(place / "text.txt"),
        "num_samples": 16,
        "seq_len": 32,
        "eval_samples": 8,
        "group_size": 32,
        "device": "cpu",
    }
    return RunConfig(**(values | {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}))


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Run:
    """Run with overrides into a new folder; returns it and the report."""

    def call(**overrides: Any) -> tuple[Path, Report]:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        config = settings(place, output=output, **overrides)
        return output, run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)

    return call


@pytest.fixture(scope="module")
def mixed(place: Path) -> tuple[Path, Report]:
    """One mixed run that many tests look at; nobody may change it."""
    config = settings(place, output=place / "mixed", bits="2,3,4,8", target_bpw=MIXED_TARGET)
    return place / "mixed", run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)


@pytest.fixture(scope="module")
def sensitivity(place: Path) -> Path:
    run_measure(settings(place, bits="2,3,4,8"), place / "sensitivity.json", Silent())
    return place / "sensitivity.json"


def read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    assert isinstance(document, dict)
    return document


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = read(source)
    change(document)
    target.write_text(json.dumps(document))
    return target


def plan_bits(folder: Path) -> dict[str, int]:
    return {entry["name"]: entry["bits"] for entry in read(folder / "reproduce/plan.json")["layers"]}


def differing_share(first: Path, second: Path, part: str = "") -> float:
    a, b = PackedReader(first), PackedReader(second)
    names = [n.removesuffix(PACKED) for n in a.index.tensors if n.endswith(PACKED) and part in n]
    different = [(a.codes(n)[0] != b.codes(n)[0]).float().flatten() for n in names]
    return float(torch.cat(different).mean())


# The report and the files.


def test_report_has_the_documented_keys(mixed: tuple[Path, Report]) -> None:
    folder, report = mixed
    stored = read(folder / "report.json")
    assert stored["schema"] == "hawqtool.report/1"
    expected = "model hawqtool_version command config sizes plan layers rows evaluation shipped timings "
    assert set((expected + "peak_memory_bytes warnings").split()) <= set(stored)
    assert {"original_bytes", "quantized_bytes", "bpw_linears", "bpw_file"} <= set(stored["sizes"])
    assert set(stored["plan"][0]) == {"name", "unit", "bits", "group_size", "symmetric", "bytes"}
    assert {"original", "uniform", "uniform_interpolated", "mixed"} <= set(stored["evaluation"])
    for name in ("original", "uniform", "mixed"):
        assert {"perplexity", "kl", "kl_stderr", "same_top", "num_tokens"} <= set(stored["evaluation"][name])
    assert stored["evaluation"]["original"]["kl"] == pytest.approx(0, abs=1e-6)
    assert stored["evaluation"]["mixed"]["num_tokens"] == 8 * 32
    assert {"kl", "kl_stderr"} <= set(stored["evaluation"]["mixed_minus_uniform"])
    assert all(seconds >= 0 for seconds in stored["timings"].values())
    assert stored["peak_memory_bytes"]["host"] > 0
    assert report["plan"] == stored["plan"]


def test_rows_are_disjoint_and_fingerprinted(mixed: tuple[Path, Report]) -> None:
    rows = mixed[1]["rows"]
    assert rows["overlap"] == 0
    assert {name: rows[name]["count"] for name in ("calibration", "scoring", "selection", "report")} == {
        "calibration": 16,
        "scoring": 8,
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
    hashes = read(folder / "reproduce/sha256.json")
    assert hashes == {"model.safetensors": file_hash(folder / "model.safetensors")}
    for name in ("config.yaml", "plan.json", "sensitivity.json", "checksums.json", "packages.json"):
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
    assert uniform["kl"] == single["mixed"]["kl"] == single["uniform"]["kl"] == single["uniform_interpolated"]["kl"]
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
    plain, _ = run(bits="3", target_bpw=3.5)
    zeroed, report = run(bits="3", target_bpw=3.5, model=tmp_path / "zeroed")
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
    assert report["evaluation"]["selection"]["mixed_minus_uniform_kl"] > 0
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
    with pytest.raises(InputError, match=r"holds 10 rows of 32 tokens, 40 are needed \(16 calibration"):
        run(bits="4", target_bpw=4.5, calibration=tmp_path / "short.txt")
    assert sorted(tmp_path.iterdir()) == before


def test_repeated_text_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("ab" * 2000)
    with pytest.raises(InputError, match="occur in more than one"):
        run(bits="4", target_bpw=4.5, calibration=tmp_path / "same.txt")


# Damage and reading back.


def test_a_changed_scale_fails_verification_and_moves_kl(place: Path, run: Run) -> None:
    folder, report = run(bits="4", target_bpw=4.5, eval_data=place / "other.txt")
    config = settings(place, eval_data=place / "other.txt")
    before = run_evaluate(config, folder, Silent())["quantized"]["kl"]
    assert before == pytest.approx(report["evaluation"]["mixed"]["kl"], rel=1e-6)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"][3, 0] *= 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert any("down_proj" in p for p in verify_folder(folder, place / "model").problems)
    after = run_evaluate(config, folder, Silent())["quantized"]["kl"]
    assert abs(after - before) > 1e-6


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


def test_saved_scores_give_the_plan_of_the_run(mixed: tuple[Path, Report], place: Path, sensitivity: Path) -> None:
    bits = allocated(place, sensitivity, place / "again.json", target_bpw=MIXED_TARGET)
    assert bits == {entry["unit"]: entry["bits"] for entry in mixed[1]["plan"]}


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
