"""Swaps of one unit of a quantized model against whole models that are held at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.allocation.problem import stored_bytes
from hawqtool.config import RunConfig
from hawqtool.evaluation.divergence import kl_divergence
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.run.resolved import resolve_settings
from hawqtool.pipeline.search.trials import TrialRunner
from hawqtool.pipeline.stages.rows import gather_rows
from hawqtool.records import BitPlan, MeasurementRows
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import round_group
from hawqtool.rounding.method import Task
from hawqtool.runtime.stage_timer import Timings
from hawqtool.runtime.store import NOTHING_SAVED
from hawqtool.sensitivity.width_swap import swap_divergence
from hawqtool.streaming.stream import ModelStream
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("swap_widths")
    (place / "text.txt").write_text(random_text(1, 4000))
    model = tiny_llama(place / "model")
    values = {"model": str(model), "calibration": str(place / "text.txt"), "num_samples": 8, "seq_len": 16}
    return prepare(RunConfig(**values, group_size=32, device="cpu", eval_samples=4, target_shift="off"))


def logits(job: Job, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        return torch.stack([model(row[None]).logits[0] for row in tokens])


def grams(job: Job, weights: dict[str, torch.Tensor], tokens: torch.Tensor, name: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        for other, weight in weights.items():
            model.get_submodule(other).weight.copy_(weight)
        model.get_submodule(name).register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, -2)))
        model(tokens)
    x = torch.cat(seen)
    return x.t() @ x / len(x)


@pytest.mark.parametrize("together", [1, 3])
def test_a_swap_is_a_whole_model_with_one_unit_changed(
    job: Job, tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelStream, "rows_together", lambda *_: together)
    sets = gather_rows(RunContext(job))
    formats = {unit.name: QuantFormat(3, 32) for unit in job.units}
    plan = BitPlan(formats, stored_bytes(job.units, formats), sum(u.num_weights for u in job.units))
    runner = TrialRunner(RunContext(job), sets, tmp_path / "work", Timings(NOTHING_SAVED))
    folder = runner.run_trial("uniform", plan).folder
    menu = {unit.name: (QuantFormat(2, 32), QuantFormat(4, 32)) for unit in job.units}
    tokens = {role: sets[role].tokens for role in ("calibration", "scoring")}
    rows = MeasurementRows(sets["calibration"], tokens["scoring"], 3)
    found = swap_divergence(job.stream(), job.packed_stream(folder), rows, job.rounding(menu), lambda *_: None)
    assert set(found) == {unit.name for unit in job.units}

    packed, source = job.packed_stream(folder).source, job.stream().source
    present = {name: packed.tensor(f"{name}.weight").float() for name in job.structure.linears}
    expected = logits(job, {}, tokens["scoring"]).log_softmax(-1)

    def divergence(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        candidates = logits(job, weights, tokens["scoring"]).log_softmax(-1)
        return torch.stack([kl_divergence(e, c) for e, c in zip(expected, candidates, strict=True)])

    start = divergence(present)
    for unit in job.units:
        for fmt in menu[unit.name]:
            changed = dict(present)
            for member in unit.members:
                gram = grams(job, present, tokens["calibration"], member.name)
                factor = factorize(gram, tokens["calibration"].numel())
                weight = source.tensor(f"{member.name}.weight").float()
                task = Task(member.name, weight, fmt, job.stored_dtypes[member.name])
                changed[member.name] = dequantize(*round_group([task], factor, job.settings.method)[0]).float()
            values = divergence(changed) - start
            score = found[unit.name][fmt.label]
            assert score.value == pytest.approx(float(values.mean()), rel=0.02, abs=2e-6), (unit.name, fmt.label)
    # On the whole, fewer bits hurt and more help.
    assert sum(s["w2g32"].value for s in found.values()) > 0 > sum(s["w4g32"].value for s in found.values())


@pytest.mark.parametrize(
    "values",
    [{"rounding": "gptaq", "gptaq_alpha": 1.0}, {"rounding": "foem", "foem_beta": "auto", "target_shift": "auto"}],
    ids=["gptaq", "auto"],
)
def test_a_swap_for_the_present_format_changes_nothing(job: Job, values: dict[str, Any], tmp_path: Path) -> None:
    """Only so if drift and held-out rows are those of the rounding of the plan."""
    config = job.config.model_copy(update=values)
    corrected = replace(job, config=config, settings=resolve_settings(config, "cpu", None))
    corrected = corrected.with_batch_size(job.settings.batch_size)
    sets = gather_rows(RunContext(job))
    formats = {unit.name: QuantFormat(3, 32) for unit in job.units}
    plan = BitPlan(formats, stored_bytes(job.units, formats), sum(u.num_weights for u in job.units))
    folder = (
        TrialRunner(RunContext(corrected), sets, tmp_path / "work", Timings(NOTHING_SAVED))
        .run_trial("uniform", plan)
        .folder
    )
    menu = {unit: (fmt,) for unit, fmt in formats.items()}
    changes = []
    rows = MeasurementRows(sets["calibration"], sets["scoring"].tokens, job.settings.batch_size)
    for some in (corrected, job):
        found = swap_divergence(job.stream(), job.packed_stream(folder), rows, some.rounding(menu), lambda *_: None)
        changes.append(sum(abs(scores["w3g32"].value) for scores in found.values()))
    assert changes[0] <= 1e-3 * changes[1]
