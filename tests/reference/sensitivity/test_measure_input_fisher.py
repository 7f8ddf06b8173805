"""Gauss-Newton sensitivity of layer inputs, as the measuring sweep gives it, against all labels of every output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import MeasurementRows, Rows, Unit
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.sensitivity.measure import Measurement, SweepSettings, measure
from tests.support.tiny import tiny_model

VOCAB, LENGTH, ROWS = 24, 5, 600


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("inputs") / "model"
    tiny_model("llama", folder, dtype=torch.float32, vocab_size=VOCAB)
    return prepare(RunConfig(model=str(folder), device="cpu", quantize_lm_head=True))


@pytest.fixture(scope="module")
def whole(job: Job) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def row() -> Tensor:
    return torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))


def measured(job: Job, rows: Tensor, batch_size: int) -> Measurement:
    menu = {unit.name: (QuantFormat(4, 32),) for unit in job.units}
    rounding = RoundingSpec(RoundingMethod("rtn"), menu, job.stored_dtypes)
    sets = MeasurementRows(Rows(rows[:4], "test", "-"), rows, batch_size)
    return measure(job.stream(), sets, rounding, SweepSettings(3), lambda *_: None)


def exact_trace(model: nn.Module, row: Tensor, unit: Unit) -> float:
    """Σ over outputs t and labels y of p_t(y) ‖∂(-log p_t(y))/∂x‖²: labels of different outputs are independent."""
    shift = torch.zeros(1, LENGTH, unit.members[0].in_features, dtype=torch.float64, requires_grad=True)
    hooks = [model.get_submodule(m.name).register_forward_pre_hook(lambda _m, x: (x[0] + shift,)) for m in unit.members]
    try:
        log_p = model(row[None]).logits[0].log_softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    total = 0.0
    for value in log_p.flatten():
        (gradient,) = torch.autograd.grad(value, shift, retain_graph=True)
        total += float(value.detach().exp() * gradient.square().sum())
    return total / LENGTH


def test_input_fisher_is_the_expectation_over_labels(job: Job, whole: nn.Module, row: Tensor) -> None:
    found = measured(job, row.expand(ROWS, LENGTH), 100).input_fisher
    assert list(found) == [unit.name for unit in job.units]
    for unit in job.units:
        exact, score = exact_trace(whole, row, unit), found[unit.name]
        assert 0 < score.stderr < 0.15 * exact
        assert abs(score.value - exact) < 3.5 * score.stderr, unit.name


def test_slices_do_not_matter_and_norms_are_of_the_errors(job: Job, row: Tensor) -> None:
    rows = torch.stack([row, row.flip(0), row.roll(1)])
    whole, sliced = measured(job, rows, 3), measured(job, rows, 1)
    for name, score in whole.input_fisher.items():
        assert sliced.input_fisher[name].value == pytest.approx(score.value, rel=1e-4)
    for unit in job.units:
        # Plain rounding at 4 bits, groups of 32: about a step²/12 with a step of a seventh of the peak.
        for member in unit.members:
            (norm,) = whole.error_norms[member.name].values()
            weight = job.stream().source.tensor(f"{member.name}.weight").float()
            assert 0.001 < norm / float(weight.square().sum()) < 0.03
