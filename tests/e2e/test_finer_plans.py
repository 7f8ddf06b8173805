"""Whole runs with finer plans: layers that serving engines fuse apart, and several group sizes in one plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.errors import HawqError, UsageError
from hawqtool.export.engines import TRANSFORMERS, VLLM
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.pipeline.allocate import run_allocate
from hawqtool.pipeline.evaluate import run_evaluate
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.run.menu import format_menu
from hawqtool.pipeline.search.width_swap import neighbouring
from hawqtool.records import LinearSpec, Unit
from hawqtool.runtime.reporter import Silent
from tests.support.runs import Report, Run, edited, plan_bits, read, settings

APART = {"profile": "transformers", "bits": "2,3,4,8", "pin": ("re:.*v_proj=8", "re:.*up_proj=4")}


@pytest.fixture(scope="module")
def apart(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A run whose plan pins one layer of each set that engines fuse."""
    output = tmp_path_factory.mktemp("apart") / "out"
    config = settings(place, output=output, target_bpw=4.2, **APART)
    return output, run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)


def test_profile_transformers_plans_every_layer_by_itself(place: Path, apart: tuple[Path, Report]) -> None:
    folder, report = apart
    bits = plan_bits(folder)
    assert {b for n, b in bits.items() if n.endswith("v_proj")} == {8}
    assert all(entry["unit"] == entry["name"] for entry in report["plan"])
    first = [bits[f"model.layers.0.self_attn.{m}_proj"] for m in "qkv"]
    assert len(set(first)) > 1
    assert report["sizes"]["quantized_bytes"] == (folder / "model.safetensors").stat().st_size
    assert verify_folder(folder, place / "model").problems == ()
    loads = {entry["engine"]: entry["loads"] for entry in report["engines"]}
    assert loads[TRANSFORMERS] is None and not loads[VLLM]  # tests do not try, see tests/conftest.py


def test_transformers_loads_layers_apart(apart: tuple[Path, Report]) -> None:
    pytest.importorskip("compressed_tensors")
    model = AutoModelForCausalLM.from_pretrained(apart[0], dtype="auto").eval()
    model(torch.arange(8)[None])  # decompresses
    reader = PackedReader(apart[0])
    for name in plan_bits(apart[0]):
        assert torch.equal(model.get_submodule(name).weight.float(), reader.tensor(f"{name}.weight").float()), name


def test_a_plan_of_layers_apart_needs_its_profile(
    place: Path, apart: tuple[Path, Report], run: Run, tmp_path: Path
) -> None:
    path = edited(apart[0] / "reproduce/plan.json", tmp_path / "plan.json", lambda document: None)
    with pytest.raises(UsageError, match=r"fused by engines but has formats .* or --profile transformers"):
        run(plan=path)
    folder, report = run(plan=path, profile="transformers")
    assert plan_bits(folder) == plan_bits(apart[0])
    mixed = report["evaluation"]["mixed"]
    again = run_evaluate(settings(place, eval_data=place / "other.txt"), folder, Silent())
    assert mixed["kl"] > 0 and again["quantized"]["kl"] > 0


def test_two_group_sizes_in_one_plan(place: Path, run: Run) -> None:
    folder, report = run(bits="2,3,4", target_bpw=4.0, extra_group_sizes="channel")
    sizes = {entry["group_size"] for entry in report["plan"]}
    assert report["evaluation"]["mixed"]["formats"] and sizes <= {32, "channel"}
    document = read(folder / "reproduce/sensitivity.json")
    labels = {label for found in document["scores"]["projection"].values() for label in found}
    assert labels == {f"w{bits}{groups}" for bits in (2, 3, 4) for groups in ("g32", "ch")}
    assert report["sizes"]["quantized_bytes"] == (folder / "model.safetensors").stat().st_size
    assert verify_folder(folder, place / "model").problems == ()


def test_a_saved_measurement_answers_with_several_group_sizes(place: Path, run: Run, tmp_path: Path) -> None:
    folder, _ = run(bits="2,3,4", target_bpw=4.0, extra_group_sizes="channel")
    saved, plans = folder / "reproduce/sensitivity.json", []
    for sizes in ((), ("channel",)):
        config = RunConfig(model=str(saved), bits="2,3,4", group_size=32, extra_group_sizes=sizes, target_bpw=4.0)
        plans.append(run_allocate(config, saved, tmp_path / "plan.json", Silent()))
    # A wider choice is never predicted to be worse.
    assert plans[1]["predicted_loss"] <= plans[0]["predicted_loss"]
    assert {entry["group_size"] for entry in plans[0]["layers"]} == {32}
    assert "channel" in {entry["group_size"] for entry in plans[1]["layers"]}


def test_the_menu_has_each_format_once_and_its_own_group_size_first() -> None:
    unit = Unit("a.0.b", (LinearSpec("a.0.b", 64, 64, 0, "a.0.b", 2),))
    config = RunConfig(model="m", group_size=128, extra_group_sizes=[64, "channel", 32])
    menu = format_menu([unit], (2, 3), config)["a.0.b"]
    assert [fmt.label for fmt in menu] == ["w2g64", "w2ch", "w2g32", "w3g64", "w3ch", "w3g32"]


def test_neighbours_are_the_next_formats_by_size() -> None:
    menu = {"u": tuple(QuantFormat(bits, size) for bits in (2, 3, 4) for size in (64, CHANNEL, 32))}
    near = neighbouring(menu, {"u": QuantFormat(3, CHANNEL)}, set())
    assert [fmt.label for fmt in near["u"]] == ["w2g32", "w3ch", "w3g64"]
    assert neighbouring(menu, {"u": QuantFormat(3, 32)}, {"u"}) == {"u": (QuantFormat(3, 32),)}


@pytest.mark.parametrize("wrong", ["40", "channel,7", ["row"], "0", "-16", "999984", "1_6"])
def test_unknown_group_sizes_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected 32, 64, 128, channel, or another multiple of 16"):
        RunConfig(model="m", extra_group_sizes=wrong, profile="transformers")


@pytest.mark.parametrize("profile", ["auto", "vllm", "portable"])
def test_unusual_group_sizes_need_their_profile(profile: Any) -> None:
    for sizes in ({"group_size": 48}, {"extra_group_sizes": "channel,48"}):
        with pytest.raises(ValueError, match="groups of 48 load in transformers alone.*--profile transformers"):
            RunConfig(model="m", bits="4,8", profile=profile, **sizes)


@pytest.fixture(scope="module")
def unusual(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A run whose plan has groups of 16."""
    output = tmp_path_factory.mktemp("unusual") / "out"
    values = APART | {"bits": "2,3,4,8", "target_bpw": 4.8, "group_size": 16, "extra_group_sizes": "32,channel"}
    return output, run_quantize(settings(place, output=output, **values), "hawqtool quantize", Silent(), lambda _: None)


def test_unusual_group_sizes_load_in_transformers(place: Path, unusual: tuple[Path, Report]) -> None:
    pytest.importorskip("compressed_tensors")
    folder, report = unusual
    assert 16 in {entry["group_size"] for entry in report["plan"]}
    assert report["sizes"]["quantized_bytes"] == (folder / "model.safetensors").stat().st_size
    assert verify_folder(folder, place / "model").problems == ()
    verdicts = {entry["engine"]: (entry["loads"], entry["reason"]) for entry in report["engines"]}
    assert verdicts[TRANSFORMERS][0] is None and not verdicts[VLLM][0]  # tests do not try, see tests/conftest.py
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model(torch.arange(8)[None])  # decompresses
    reader = PackedReader(folder)
    for name in plan_bits(folder):
        assert torch.equal(model.get_submodule(name).weight.float(), reader.tensor(f"{name}.weight").float()), name


def test_a_plan_with_unusual_groups_needs_its_profile(unusual: tuple[Path, Report], run: Run, tmp_path: Path) -> None:
    def fused(document: dict[str, Any]) -> None:
        for layer in document["layers"]:
            layer |= {"bits": 3, "group_size": 16}

    path = edited(unusual[0] / "reproduce/plan.json", tmp_path / "plan.json", fused)
    with pytest.raises(UsageError, match=r"plan.json: groups of 16 load in transformers alone"):
        run(plan=path)
    edited(path, path, lambda document: document["layers"][0].update(group_size=40))
    with pytest.raises(HawqError, match=r"group_size 40, expected 32, 64, 128, channel, or another multiple of 16"):
        run(plan=path, profile="transformers")


def test_a_saved_measurement_answers_with_unusual_groups(unusual: tuple[Path, Report], tmp_path: Path) -> None:
    saved = unusual[0] / "reproduce/sensitivity.json"
    config = RunConfig(
        model=str(saved),
        bits="2,3,4",
        group_size=16,
        extra_group_sizes="channel",
        target_bpw=4.5,
        profile="transformers",
    )
    plan = run_allocate(config, saved, tmp_path / "plan.json", Silent())
    assert {entry["group_size"] for entry in plan["layers"]} == {16, "channel"}
