"""Measured single-unit divergence against whole models with one weight replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig
from hawqtool.errors import NumericalError
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import MeasurementRows, Rows, UnitScores
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.sensitivity.measure import head_errors, rounding_errors
from hawqtool.sensitivity.measured_kl import single_unit_divergence
from hawqtool.streaming.block import advance
from tests.reference.sensitivity.test_scores import CALIBRATION, FORMATS, SCORING, Watch, whole_model_errors
from tests.support.tiny import tiny_model
from tests.support.tiny_zoo import kind_named, save_kind

NARROW, WIDE = QuantFormat(2, 32), QuantFormat(8, 32)
GPTQ = RoundingMethod("gptq")


def measured(
    job: Job,
    calibration: Tensor,
    rows: Tensor,
    formats: tuple[QuantFormat, ...],
    batches: int = 4,
    seen: list[Any] | None = None,
) -> UnitScores:
    menu = {unit.name: formats for unit in job.units}
    into = [] if seen is None else seen
    return single_unit_divergence(
        job.stream(),
        MeasurementRows(Rows(calibration, "test", "-"), rows, batches),
        RoundingSpec(GPTQ, menu, job.stored_dtypes),
        lambda *step: into.append(step),
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("single") / "model"
    tiny_model("qwen2", folder, dtype=torch.float32)
    return prepare(RunConfig(model=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def found(job: Job) -> UnitScores:
    return measured(job, CALIBRATION, SCORING, FORMATS)


def test_it_equals_whole_model_passes_with_one_unit_replaced(job: Job, found: UnitScores) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32).eval()
    errors = whole_model_errors(job, model, Watch(model, job), "gptq")
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval()
    with torch.no_grad():
        log_p = model(SCORING).logits.log_softmax(-1)
        assert set(found) == {unit.name for unit in job.units}
        for unit in job.units:
            # 8 bits differ by too little for the float32 of the other side.
            for label in ("w2g32", "w3g32"):
                weights = {m.name: model.get_submodule(m.name).weight for m in unit.members}
                originals = {name: weight.clone() for name, weight in weights.items()}
                for name, weight in weights.items():
                    weight.add_(errors[name][label])
                log_q = model(SCORING).logits.log_softmax(-1)
                for name, weight in weights.items():
                    weight.copy_(originals[name])
                rows = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
                score = found[unit.name][label]
                assert score.value == pytest.approx(float(rows.mean()), rel=1e-4)
                assert score.stderr == pytest.approx(float(rows.std()) / len(rows) ** 0.5, rel=1e-3)


def test_narrow_formats_are_worse_than_wide_ones(found: UnitScores) -> None:
    for by_label in found.values():
        assert by_label["w2g32"].value > by_label["w3g32"].value > by_label["w8g32"].value > -1e-7


def test_neither_order_nor_slices_nor_other_units_matter(job: Job, found: UnitScores) -> None:
    other = replace(job, units=tuple(reversed(job.units)))
    for unit, by_label in measured(other, CALIBRATION, SCORING, (WIDE, NARROW), batches=2).items():
        assert by_label["w2g32"].value == pytest.approx(found[unit]["w2g32"].value, rel=1e-4)
    last = job.units[-1].name
    rows = MeasurementRows(Rows(CALIBRATION, "test", "-"), SCORING, 4)
    rounding = RoundingSpec(GPTQ, {last: [NARROW]}, job.stored_dtypes)
    alone = single_unit_divergence(job.stream(), rows, rounding, lambda *_: None)
    # To the bit: weights that were not restored exactly would show.
    assert alone == {last: {"w2g32": found[last]["w2g32"]}}


def test_progress_counts_candidates(job: Job) -> None:
    seen: list[Any] = []
    measured(job, CALIBRATION, SCORING, (NARROW, WIDE), seen=seen)
    total = 2 * len(job.units)
    assert seen == [("single units", done, total) for done in range(2, total + 1, 2)]


def test_outputs_that_are_not_finite_name_the_unit(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> dict[str, dict[str, Tensor]]:
        errors = rounding_errors(*arguments)
        return {name: {label: e * float("inf") for label, e in found.items()} for name, found in errors.items()}

    monkeypatch.setattr("hawqtool.sensitivity.measured_kl.rounding_errors", broken)
    with pytest.raises(NumericalError, match=r"layers\.0\..* at w2g32: .*NaN or Inf"):
        measured(job, CALIBRATION, SCORING, (NARROW,))


# Other kinds of units: the walk from block to block against a model that is loaded with the weights replaced.


class Overlay(TensorReader):
    """A checkpoint some of whose tensors are replaced."""

    def __init__(self, job: Job, replaced: dict[str, Tensor]) -> None:
        super().__init__(job.index)
        self.replaced = replaced

    def tensor(self, name: str) -> Tensor:
        return self.replaced[name] if name in self.replaced else super().tensor(name)


def errors_of(job: Job, calibration: Tensor) -> dict[str, dict[str, Tensor]]:
    stream, rounding = job.stream(), RoundingSpec(GPTQ, {u.name: [NARROW] for u in job.units}, job.stored_dtypes)
    known, errors = stream.embed(calibration, 64), {}
    for spec in job.structure.blocks:
        with stream.block(spec.index) as block:
            errors |= rounding_errors(block, known, rounding)
            advance(block, known)
    return errors | head_errors(stream, calibration, known, rounding)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"quantize_lm_head": True}),
        ("gpt2", {"profile": "vllm"}),  # transposed weights
        ("qwen3-moe", {}),  # one unit for all experts, with a dense block between
        ("qwen3-moe", {"profile": "vllm"}),  # one per block
        ("bert", {}),  # an embedding
        ("vit", {}),  # one output per row
    ],
)
def test_every_kind_of_unit_equals_a_model_with_its_weights_replaced(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_kind(kind_named(kind), tmp_path / "model", torch.float32)
    job = prepare(RunConfig(model=str(folder), device="cpu", **settings))
    generator = torch.Generator().manual_seed(2)
    if job.row_format.values is not None:
        size = job.skeleton.config.image_size
        calibration, rows = (torch.randn(n, 3, size, size, generator=generator) for n in (8, 5))
    else:
        calibration, rows = (torch.randint(2, 120, (n, 32), generator=generator) for n in (8, 5))
    found, errors, stream = (
        measured(job, calibration, rows, (NARROW,), batches=64),
        errors_of(job, calibration),
        job.stream(),
    )
    assert set(found) == {unit.name for unit in job.units}
    original = stream.final_hidden(rows, 64, lambda _: None)
    reader = TensorReader(job.index)
    for unit in job.units:
        replaced = {}
        for member in unit.members:
            weight, error = reader.tensor(f"{member.name}.weight"), errors[member.name][NARROW.label]
            replaced[f"{member.name}.weight"] = weight + (error.t() if member.transposed else error)
        candidate = job.stream(Overlay(job, replaced))
        with torch.no_grad():
            hidden = candidate.final_hidden(rows, 64, lambda _: None)
        expected = OutputComparison(stream, candidate, rows, original).evaluation(hidden)
        score = found[unit.name][NARROW.label]
        assert score.value == pytest.approx(expected.divergence, rel=1e-4), unit.name
        assert score.stderr == pytest.approx(expected.stderr, rel=1e-3)
