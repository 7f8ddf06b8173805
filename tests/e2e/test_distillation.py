"""Distilled runs: the folder has the divergence that was measured, and nothing but scales and norm gains changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.export.packed_reader import PACKED
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.stages import distill
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.refine import fitting_rows, split_rows
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import Rows
from tests.e2e.test_refinement import job_of, plan_of
from tests.support.runs import Run, completed, read
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind

STEPS = 20


@pytest.mark.parametrize(
    ("name", "codes"), [("qwen3", False), ("qwen3", True), ("gpt2", True), ("mixtral", True), ("bert", False)]
)
def test_the_folder_has_the_divergence_that_was_reported(name: str, codes: bool, tmp_path: Path) -> None:
    kind = kind_named(name)
    job = job_of(save_kind(kind, tmp_path / "source"), refine_steps=0, distill_steps=STEPS, distill_codes=codes)
    rows = torch.cat([calibration_inputs(kind, seed) for seed in range(4, 10)])
    found = round_to_folder(RunContext(job), plan_of(job, 3), Rows(rows, "test", "-"), tmp_path / "out", "test")
    record = found["distillation"]
    assert record["error_after"] < record["error_before"] and record["best_step"] > 0
    evaluator = Evaluator(RunContext(job), {"held": Rows(split_rows(rows)[1], "test", "-")})
    with torch.no_grad():
        measured = evaluator.evaluate(tmp_path / "out", "out")["held"].divergence
    assert measured == pytest.approx(record["error_after"], rel=1e-3)
    folder = completed(tmp_path / "out", tmp_path / "source", distill_steps=STEPS)
    assert verify_folder(folder, tmp_path / "source").problems == ()
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) == found["total_bytes"]


@pytest.mark.parametrize("more", [{}, {"symmetric": False}, {"refine_steps": 10}, {"quantize_lm_head": True}], ids=str)
def test_codes_stay_and_only_scales_and_gains_change(place: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    rows = Rows(torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1)), "test", "-")
    files, found = [], {}
    for steps in (0, STEPS):
        job = job_of(place / "model", **{"refine_steps": 0, "distill_steps": steps} | more)
        folder = tmp_path / str(steps)
        # Rows that distillation holds out are not rounded on.
        seen = rows if steps or more.get("refine_steps") else fitting_rows(rows)
        found = round_to_folder(RunContext(job), plan_of(job, 3), seen, folder, "test")
        files.append(load_file(folder / "model.safetensors"))
    plain, distilled = files
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, distilled[name])}
    assert plain.keys() == distilled.keys()
    assert changed and all(name.endswith(("weight_scale", "norm.weight")) for name in changed)
    gains = {name for name in changed if name.endswith("norm.weight")}
    assert gains <= set(read(tmp_path / f"{STEPS}/reproduce/checksums.json")["changed"])
    assert any(name.endswith(PACKED) for name in plain)
    assert found["distillation"]["error_after"] < found["distillation"]["error_before"]
    folder = completed(tmp_path / str(STEPS), place / "model", distill_steps=STEPS)
    assert verify_folder(folder, place / "model").problems == ()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_learned_where_that_is_asked_for(
    symmetric: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "CODE_MARGIN", 0.0)  # so few steps do not get over it
    rows = Rows(torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1)), "test", "-")
    found, files = {}, {}
    for codes in (False, True):
        job = job_of(place / "model", refine_steps=0, distill_steps=STEPS, distill_codes=codes, symmetric=symmetric)
        folder = tmp_path / str(codes)
        found[codes] = round_to_folder(RunContext(job), plan_of(job, 2), rows, folder, "test")["distillation"]
        files[codes] = load_file(folder / "model.safetensors")
        completed(folder, place / "model", distill_steps=STEPS)
        assert verify_folder(folder, place / "model").problems == ()
    changed = {name for name, tensor in files[False].items() if not torch.equal(tensor, files[True][name])}
    assert any(name.endswith(PACKED) for name in changed)
    assert all(name.endswith((PACKED, "weight_scale", "norm.weight")) for name in changed)
    assert found[True]["error_after"] < found[True]["error_before"] == found[False]["error_before"]


def test_gradients_at_the_outputs_are_those_of_the_mean(place: Path) -> None:
    job = job_of(place / "model")
    rows = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(1))
    stream, other = job.stream(), job.stream()
    goals = stream.final_hidden(rows, 3, lambda _: None)
    comparison = OutputComparison(stream, other, rows, goals)
    assert comparison.divergence(goals).tolist() == pytest.approx([0] * 3, abs=1e-6)
    hidden = goals + 0.3 * torch.randn(goals.shape, generator=torch.Generator().manual_seed(2))
    gradient = comparison.gradient(hidden)
    direction = torch.randn(goals.shape, generator=torch.Generator().manual_seed(3))
    ahead, behind = (comparison.divergence(hidden + step * direction).mean() for step in (1e-2, -1e-2))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-2, rel=1e-2)


def test_a_whole_distilled_run(run: Run) -> None:
    _, report = run(bits="3", target_bpw=4.0)
    folder, distilled = run(bits="3", target_bpw=4.0, distill_steps=12)
    assert distilled["sizes"] == report["sizes"]
    assert report["distillation"] == {} and distilled["distillation"]["steps"] <= 12
    assert "distillation: 12 steps" in (folder / "README.md").read_text()
    again, _ = run(bits="3", target_bpw=4.0, distill_steps=12)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
