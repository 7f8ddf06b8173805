"""Refined runs: what the folder holds is what was measured, on several architectures, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.stages.refine import split_rows
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan, Rows
from hawqtool.rounding.learned.block import output_error
from hawqtool.streaming.block import advance
from tests.support.runs import PACKED, Run, completed, read
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind

KINDS = ("qwen3", "gpt2", "mixtral", "bert")
STEPS = 20


def job_of(model: Path, **overrides: object) -> Job:
    values = {"group_size": 32, "device": "cpu", "profile": "vllm", "refine_steps": STEPS, "target_shift": 0.0}
    return prepare(RunConfig(model=str(model), **(values | overrides)))  # type: ignore[arg-type]


def plan_of(job: Job, bits: int) -> BitPlan:
    formats = uniform_formats(job.units, bits, 32, job.config.symmetric)
    return BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))


def block_errors(job: Job, folder: Path, rows: Tensor) -> list[float]:
    """Relative error of every block's output on rows, from the written folder alone."""
    original, written = job.stream(), job.packed_stream(folder)
    states = [stream.embed(rows, len(rows)) for stream in (original, written)]
    found = []
    for spec in job.structure.blocks:
        for stream, state in zip((original, written), states, strict=True):
            with stream.block(spec.index) as block:
                advance(block, state)
        found.append(float(output_error(states[1].hidden[0], states[0].hidden[0])))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_folder_gives_the_errors_that_were_reported(name: str, tmp_path: Path) -> None:
    kind = kind_named(name)
    job = job_of(save_kind(kind, tmp_path / "source"))
    rows = torch.cat([calibration_inputs(kind, seed) for seed in range(4, 10)])
    found = round_to_folder(RunContext(job), plan_of(job, 3), Rows(rows, "test", "-"), tmp_path / "out", "test")
    record = found["refinement"]
    assert list(record) == [spec.name for spec in job.structure.blocks]
    assert all(block["error_after"] <= block["error_before"] for block in record.values())
    assert any(block["best_step"] > 0 for block in record.values())
    expected = [block["error_after"] for block in record.values()]
    assert block_errors(job, tmp_path / "out", split_rows(rows)[1]) == pytest.approx(expected, rel=1e-3)
    folder = completed(tmp_path / "out", tmp_path / "source", refine_steps=STEPS)
    assert verify_folder(folder, tmp_path / "source").problems == ()
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) == found["total_bytes"]


def test_asymmetric_layers_are_refined_too(place: Path, tmp_path: Path) -> None:
    job = job_of(place / "model", symmetric=False)
    rows = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    found = round_to_folder(RunContext(job), plan_of(job, 2), Rows(rows, "test", "-"), tmp_path / "out", "test")
    expected = [block["error_after"] for block in found["refinement"].values()]
    assert block_errors(job, tmp_path / "out", split_rows(rows)[1]) == pytest.approx(expected, rel=1e-3)
    folder = completed(tmp_path / "out", place / "model", refine_steps=STEPS)
    assert verify_folder(folder, place / "model").problems == ()


@pytest.fixture(scope="module")
def refined(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = job_of(place / "model")
    folder = tmp_path_factory.mktemp("refined") / "out"
    rows = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(1))
    round_to_folder(RunContext(job), plan_of(job, 3), Rows(rows, "test", "-"), folder, "test")
    return folder


def test_only_codes_scales_and_norm_gains_change(place: Path, refined: Path) -> None:
    source = load_file(place / "model/model.safetensors")
    written = load_file(refined / "model.safetensors")
    changed = {name for name, tensor in source.items() if name in written and not torch.equal(tensor, written[name])}
    assert changed and all("layernorm.weight" in name for name in changed)
    assert changed <= set(read(refined / "reproduce/checksums.json")["changed"])
    packed = {name.removesuffix(PACKED) for name in written if name.endswith(PACKED)}
    assert {name.removesuffix(".weight") for name in set(source) - set(written)} == packed


def test_verification_holds_changed_tensors_to_their_record(place: Path, refined: Path) -> None:
    record, path = read(refined / "reproduce/checksums.json"), refined / "reproduce/checksums.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(record | {"changed": []}))
        assert any("layernorm" in problem for problem in verify_folder(refined, place / "model").problems)
        path.write_text(json.dumps(record | {"changed": [*record["changed"], "model.embed_tokens.weight"]}))
        assert any("norm gains alone" in problem for problem in verify_folder(refined, place / "model").problems)
    finally:
        path.write_text(text)
    tensors = load_file(refined / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    other = refined.with_name("other")
    other.mkdir()
    for file in refined.rglob("*.json"):
        (other / file.relative_to(refined)).parent.mkdir(exist_ok=True)
        (other / file.relative_to(refined)).write_bytes(file.read_bytes())
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert any("model.norm.weight" in problem for problem in verify_folder(other, place / "model").problems)


def test_no_steps_give_the_rounding_alone(place: Path, tmp_path: Path) -> None:
    rows = Rows(torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1)), "test", "-")
    job = job_of(place / "model", refine_steps=0)
    found = round_to_folder(RunContext(job), plan_of(job, 3), rows, tmp_path / "out", "test")
    assert found["refinement"] == {} and read(tmp_path / "out/reproduce/checksums.json")["changed"] == []


def test_a_whole_refined_run(place: Path, run: Run) -> None:
    pytest.importorskip("compressed_tensors")
    plain, report = run(bits="3", target_bpw=4.0)
    folder, refined = run(bits="3", target_bpw=4.0, refine_steps=12)
    assert refined["sizes"] == report["sizes"]
    assert set(refined["refinement"]) == {"model.layers.0", "model.layers.1"}
    assert "refinement: at most 12 steps" in (folder / "README.md").read_text()
    assert (plain / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    again, _ = run(bits="3", target_bpw=4.0, refine_steps=12)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    reader, tokens = PackedReader(folder), torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(reader.tensor(name))
        expected, found = ours(tokens).logits, loaded(tokens).logits
    assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        split_rows(torch.zeros(1, 8))
    assert [len(part) for part in split_rows(torch.zeros(16, 8))] == [14, 2]
    assert [len(part) for part in split_rows(torch.zeros(3, 8))] == [2, 1]
