"""Formats of floats and with rounded inputs, from the command's configuration to transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.formats import parse_label
from hawqtool.formats.menus import MENUS
from hawqtool.pipeline.allocate import run_allocate
from hawqtool.pipeline.run.files import read_sensitivity
from hawqtool.pipeline.run.job import prepare
from hawqtool.report.wording import cost_text
from tests.support.runs import Run, read
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind


def plan_of(sensitivity: Path, **settings: Any) -> Any:
    """The plan that ``hawqtool allocate`` makes of a measurement."""
    return run_allocate(RunConfig(model="-", **settings), sensitivity, sensitivity.with_name("new-plan.json"))


NO_DATA = {"num_samples": None, "seq_len": None, "eval_samples": None}


@pytest.fixture(scope="module")
def exact(place: Path) -> Path:
    """The model in float32, in which outputs can be compared to the bit."""
    return tiny_llama(place / "float32", dtype=torch.float32)


def test_rounded_inputs_give_the_outputs_of_transformers(exact: Path, run: Run) -> None:
    label = "fp8-a8f"
    folder, report = run(model=str(exact), formats=label, group_size=None)
    assert verify_folder(folder, exact).problems == ()
    assert report["shipped"] == "uniform" and {entry["format"] for entry in report["plan"]} == {label}
    plan = read(folder / "reproduce/plan.json")
    assert sum(layer["bytes"] for layer in plan["layers"]) == report["sizes"]["stored_bytes_linears"]
    tokens = torch.arange(48)[None] + 3
    stream = prepare(RunConfig(model=str(exact), device="cpu"), writes=False).packed_stream(folder)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        own = stream.outputs(tokens, stream.final_hidden(tokens, 1, lambda _: None))
        stream.input_formats = {}
        unrounded = stream.outputs(tokens, stream.final_hidden(tokens, 1, lambda _: None))
    assert torch.equal(own.view_as(loaded), loaded)
    assert not torch.equal(own, unrounded)


def test_inputs_in_nvfp4_give_the_outputs_of_transformers(place: Path, run: Run) -> None:
    folder, report = run(formats="nvfp4-a4", group_size=None, rounding="rtn", eval=False, eval_samples=None)
    assert verify_folder(folder, place / "model").problems == ()
    assert {entry["format"] for entry in report["plan"]} == {"nvfp4-a4"}
    tokens = torch.arange(48)[None] + 3
    stream = prepare(RunConfig(model=str(place / "model"), device="cpu"), writes=False).packed_stream(folder)
    divisors = {name: kind.divisor for name, kind in stream.input_formats.items()}
    attention = {divisors[f"model.layers.0.self_attn.{role}_proj"] for role in "qkv"}
    assert len(attention) == 1 and len(set(divisors.values())) > 1
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded(tokens)  # which decompresses the weights, to bfloat16
    with torch.no_grad():
        logits = torch.nn.Module.float(loaded)(tokens).logits
        own = stream.outputs(tokens, stream.final_hidden(tokens, 1, lambda _: None))
    assert torch.equal(own.view_as(logits), logits)


def test_nvfp4_is_compensated_and_shares_a_divisor(place: Path, run: Run) -> None:
    folder, report = run(formats="nvfp4", group_size=None)
    assert verify_folder(folder, place / "model").problems == ()
    reader = PackedReader(folder)
    q, k, down = (
        reader.codes(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    )
    assert q.divisor == k.divisor and q.divisor and down.divisor
    layers = report["layers"].values()
    assert sum(layer["output_error"] for layer in layers) < 0.9 * sum(layer["rtn_error"] for layer in layers)
    assert report["sizes"]["bpw_linears"] == pytest.approx(4.5, abs=0.01)


def test_what_would_not_load_is_refused_before_the_work(exact: Path, run: Run) -> None:
    with pytest.raises(UsageError, match="nvfp4 needs a bfloat16 model"):
        run(model=str(exact), formats="nvfp4", group_size=None)
    with pytest.raises(ValueError, match="distill_steps works on integer grids"):
        run(formats="fp8", group_size=None, distill_steps=5)
    with pytest.raises(ValueError, match="refine_steps run blocks on inputs as they are, found fp8-a8f"):
        run(formats="fp8-a8f", group_size=None, refine_steps=5)
    with pytest.raises(ValueError, match="gumbel chooses among integer codes"):
        run(formats="fp8", group_size=None, refine_steps=5, refine_learner="gumbel")


def test_refinement_walks_the_codebook(place: Path, run: Run) -> None:
    folder, report = run(formats="nvfp4", group_size=None, refine_steps=40, eval=False, eval_samples=None)
    assert verify_folder(folder, place / "model").problems == ()
    found = report["refinement"].values()
    assert any(block["error_after"] < block["error_before"] for block in found)
    assert report["sizes"]["bpw_linears"] == pytest.approx(4.5, abs=0.01)


def test_weights_that_loading_reads_keep_their_names(run: Run, tmp_path: Path) -> None:
    kind = kind_named("modernbert")
    model = save_kind(kind, tmp_path / "model", torch.float32)
    with pytest.raises(InputError, match=r"stops at packed layers; --formats fp8 stores 8 bits under the weights' own"):
        run(model=str(model), bits="4")
    folder, _ = run(model=str(model), formats="fp8", group_size=None, num_samples=4)
    inputs = {"input_ids": torch.arange(32)[None] + 3}
    with torch.no_grad():
        loaded = kind.auto_class.from_pretrained(folder)(**inputs)[0]
        own = kind.auto_class.from_pretrained(model)
        for name, parameter in own.named_parameters():
            parameter.copy_(PackedReader(folder).tensor(name))
        expected = own(**inputs)[0]
    assert torch.equal(loaded, expected)


def test_a_mixed_plan_counts_what_rounding_inputs_costs(run: Run) -> None:
    folder, report = run(
        formats="nvfp4,nvfp4-a4,fp8-a8f,w8ch-a8i", group_size=None, target_bpw=6.5, eval=False, eval_samples=None
    )
    assert len({entry["format"] for entry in report["plan"]}) > 1
    document = read(folder / "reproduce/sensitivity.json")
    for unit, costs in document["curvature"].items():
        assert costs["inputs w8ch-a8i"] < costs["inputs fp8-a8f"] < costs["inputs nvfp4-a4"]
        assert "inputs nvfp4" not in costs
        for metric, scores in document["scores"].items():
            assert scores[unit]["fp8-a8f"][0] > costs["inputs fp8-a8f"] > 0, metric


def test_hardware_prices_a_plan_and_bounds_it(run: Run) -> None:
    common = {"group_size": None, "rounding": "rtn", "eval": False, "eval_samples": None, "target_bpw": 9}
    folder, free = run(**common, formats="nvfp4,fp8-a8f", costs="hopper:1", max_cost=1e6)
    assert free["config"]["costs"] == "hopper:1" and not list((folder / "reproduce").glob("costs*"))
    assert {entry["format"] for entry in free["plan"]} == {"fp8-a8f"}
    read_in = sum(entry["bytes"] for entry in free["plan"]) / 3.35e12  # one token waits for memory
    assert free["cost"] == pytest.approx(1e6 * read_in)
    _, report = run(**common, formats="nvfp4,fp8-a8f", costs="hopper:1", max_cost=0.75 * free["cost"])
    assert report["cost"] <= report["max_cost"] == 0.75 * free["cost"]
    assert "microseconds of a step by the roofline of hopper:1" in str(cost_text(report))
    assert f"Second budget: {cost_text(free)}" in (folder / "README.md").read_text()
    assert {entry["format"] for entry in report["plan"]} == {"nvfp4", "fp8-a8f"}
    assert 4.5 < report["sizes"]["effective_bits"] < 8 == free["sizes"]["effective_bits"]
    with pytest.raises(UsageError, match="w8ch-a8i does not run there"):
        run(**common, formats="w8ch-a8i,nvfp4", costs="blackwell:1", max_cost=1)


def test_units_that_stay_are_part_of_the_exact_plan(place: Path, run: Run) -> None:
    folder, report = run(formats="hopper", group_size=None, target_bpw=9.5, eval=False, eval_samples=None)
    assert verify_folder(folder, place / "model").problems == ()
    assert {entry["format"] for entry in report["plan"]} == {"nvfp4", "fp8-a8f", "16"}
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) == report["sizes"]["quantized_bytes"]
    table, units, _ = read_sensitivity(folder / "reproduce/sensitivity.json")
    kinds, scores = [parse_label(label) for label in MENUS["hopper"]], table.scores[report["metric"]]
    costs = [[(unit.stored_bytes(kind), scores[unit.name][kind.label].value) for kind in kinds] for unit in units]
    sums = [[sum(column) for column in zip(*plan, strict=True)] for plan in itertools.product(*costs)]
    budget = 9.5 * sum(unit.num_weights for unit in units) / 8
    assert report["predicted_loss"] == pytest.approx(min(loss for size, loss in sums if size <= budget), rel=1e-9)
    loaded, reader = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), PackedReader(folder)
    loaded(torch.tensor([[3, 4, 5]]))
    original = AutoModelForCausalLM.from_pretrained(place / "model", dtype="auto")
    for entry in report["plan"]:
        name = f"{entry['name']}.weight"
        weight = loaded.get_parameter(name)
        assert torch.equal(weight, reader.tensor(name)), name
        assert torch.equal(weight, original.get_parameter(name)) == (entry["format"] == "16"), name
    layers = plan_of(folder / "reproduce/sensitivity.json", target_bpw=12.0, formats="16,fp8-a8f")["layers"]
    assert {entry["format"] for entry in layers} == {"fp8-a8f", "16"}
    with pytest.raises(ValueError, match="16 alone"):
        run(formats="16", group_size=None)


def test_experts_load_in_transformers_to_the_bit(run: Run, tmp_path: Path) -> None:
    kind = kind_named("qwen3-moe")
    model = save_kind(kind, tmp_path / "model", torch.bfloat16)
    with pytest.raises(UsageError, match="nvfp4 is not for experts"):
        run(model=str(model), formats="nvfp4", group_size=None)
    other = save_kind(kind, tmp_path / "float32", torch.float32)
    with pytest.raises(UsageError, match="fp8 of experts .* needs a bfloat16 model"):
        run(model=str(other), formats="fp8", group_size=None)
    folder, _ = run(model=str(model), formats="mxfp4", group_size=None, rounding="rtn", calibration="self", **NO_DATA)
    loaded, reader = kind.auto_class.from_pretrained(folder, dtype="auto"), PackedReader(folder)
    loaded(torch.tensor([[3, 4, 5]]))
    experts = loaded.model.layers[0].mlp.experts
    for number, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        place = f"model.layers.0.mlp.experts.{number}"
        gate, up, own = (reader.tensor(f"{place}.{role}_proj.weight") for role in ("gate", "up", "down"))
        assert torch.equal(both, torch.cat([gate, up])) and torch.equal(down, own), place
