"""Sensitivity scores against exact enumeration of the labels, slow loops, and a plain whole-model backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import SWEEP_METRICS, MeasurementRows, Rows, UnitScores
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.gram import GRAM_PANEL, gram
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import round_group
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.sensitivity import forward as sweeps
from hawqtool.sensitivity import scores
from hawqtool.sensitivity.label_gradients import draw_labels
from hawqtool.sensitivity.measure import SweepSettings, measure
from hawqtool.sensitivity.scores import SIGNED, LayerRows, score_rows, to_scores
from tests.support.tiny import tiny_model

VOCAB, LENGTH = 24, 5
LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")
FORMATS = (QuantFormat(2, 32), QuantFormat(3, 32), QuantFormat(8, 32))
METRICS = ("fisher", "hawq-ggn", "kron", "projection")


@dataclass(frozen=True)
class Probes:
    """Gradients of one layer: ``inputs [probes, T, in]``, ``gradients [probes, T, out]``, weights of the probes."""

    inputs: Tensor
    gradients: Tensor
    weights: Tensor


def probes_of(model: nn.Module, layer: str, tokens: Tensor, loss_of: object, weights: Tensor) -> Probes:
    """One backward pass; every row of ``tokens`` is a probe with a loss of its own."""
    held: dict[str, Tensor] = {}
    module = model.get_submodule(layer)
    hook = module.register_forward_hook(lambda _m, i, o: held.update(x=i[0].detach(), y=o))
    model.requires_grad_(True)
    logits = model(tokens).logits
    hook.remove()
    (gradients,) = torch.autograd.grad(loss_of(logits).sum(), held["y"])
    return Probes(held["x"], gradients, weights)


def enumerated(model: nn.Module, layer: str, row: Tensor) -> Probes:
    """Every (position, label) is a probe of weight p_t(y): scores of different positions are independent, mean zero."""
    length, count = len(row), len(row) * VOCAB
    position = torch.arange(length).repeat_interleave(VOCAB)
    label = torch.arange(VOCAB).repeat(length)
    with torch.no_grad():
        weights = model(row[None]).logits[0].softmax(-1)[position, label]

    def loss(logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1)[torch.arange(count), position, label]

    return probes_of(model, layer, row.expand(count, length), loss, weights)


def sampled(model: nn.Module, layer: str, row: Tensor, count: int) -> Probes:
    """Labels drawn at all positions at once, as the estimator does."""
    with torch.no_grad():
        probabilities = model(row[None]).logits[0].softmax(-1)
    labels = torch.multinomial(probabilities, count, replacement=True, generator=torch.Generator().manual_seed(5))

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels.t(), reduction="none").sum(1)

    return probes_of(model, layer, row.expand(count, len(row)), loss, torch.full((count,), 1 / count))


def exact_scores(probes: Probes, error: Tensor) -> dict[str, float]:
    """The definitions, in float64, with F = sum of p G Gᵀ over all probes."""
    length = probes.inputs.shape[1]
    full = torch.einsum("nto,nti->noi", probes.gradients, probes.inputs)
    diagonal = torch.einsum("n,noi->oi", probes.weights, full.square())
    power = torch.einsum("n,nto->o", probes.weights, probes.gradients.square()) / length
    x = probes.inputs[0]
    second_moment = x.t() @ x / length
    return {
        "fisher": float((diagonal * error.square()).sum() / (2 * length)),
        "hawq-ggn": float(0.5 * diagonal.sum() / (length * error.numel()) * error.square().sum()),
        "projection": float((probes.weights[:, None] * (full * error).sum(2).square()).sum() / (2 * length)),
        "kron": float(0.5 * (power * (error @ second_moment @ error.t()).diagonal()).sum()),
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tmp_path_factory.mktemp("small") / "model"
    tiny_model("llama", folder, dtype=torch.float32, vocab_size=VOCAB)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def row() -> Tensor:
    return torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))


def layer_rows(inputs: Tensor, grads: Tensor) -> LayerRows:
    return LayerRows(zip(inputs, grads, strict=True), inputs.shape[1], inputs.shape[1])


def random_error(model: nn.Module, layer: str, relative: float) -> Tensor:
    weight = model.get_submodule(layer).weight.detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return relative * weight.std() * noise


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_of_enumerated_labels_are_the_exact_ones(small: nn.Module, row: Tensor, layer: str) -> None:
    probes, error = enumerated(small, layer, row), random_error(small, layer, 0.3)
    exact = exact_scores(probes, error)
    # A mean over n probes whose squares are weighted by n p is the expectation over labels.
    scaled = probes.gradients * (len(probes.weights) * probes.weights).sqrt()[:, None, None]
    found = to_scores(score_rows([layer_rows(probes.inputs, scaled)], [{"e": error.float()}])[0])
    assert set(found) == set(METRICS)
    for metric in METRICS:
        assert found[metric]["e"].value == pytest.approx(exact[metric], rel=1e-4)


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_sampled_labels_give_unbiased_scores(small: nn.Module, row: Tensor, layer: str) -> None:
    error = random_error(small, layer, 0.3)
    exact = exact_scores(enumerated(small, layer, row), error)
    probes = sampled(small, layer, row, 1500)
    found = to_scores(score_rows([layer_rows(probes.inputs, probes.gradients)], [{"e": error.float()}])[0])
    for metric in METRICS:
        score = found[metric]["e"]
        assert 0 < score.stderr < 0.1 * exact[metric]
        assert abs(score.value - exact[metric]) < 3.5 * score.stderr


def test_standard_errors_cover_the_truth(small: nn.Module, row: Tensor) -> None:
    """Over 200 draws of 32 probes: 68 and 95 % within one and two standard errors, with a binomial margin."""
    draws, count, layer = 200, 32, LAYERS[1]
    error = random_error(small, layer, 0.3)
    exact = exact_scores(enumerated(small, layer, row), error)
    probes = sampled(small, layer, row, draws * count)
    inputs, gradients = probes.inputs.split(count), probes.gradients.split(count)
    found = [
        to_scores(score_rows([layer_rows(x, g)], [{"e": error.float()}])[0])
        for x, g in zip(inputs, gradients, strict=True)
    ]
    for metric in METRICS:
        scores = [scores[metric]["e"] for scores in found]
        deviations = torch.tensor([abs(score.value - exact[metric]) / score.stderr for score in scores])
        for share, quantile in ((0.683, 1.0), (0.954, 2.0)):
            margin = 3 * (share * (1 - share) / draws) ** 0.5
            assert float((deviations < quantile).double().mean()) == pytest.approx(share, abs=margin), metric


@pytest.mark.parametrize("layer", LAYERS)
def test_the_full_fisher_predicts_kl(small: nn.Module, row: Tensor, layer: str) -> None:
    probes, error = enumerated(small, layer, row), random_error(small, layer, 0.01)
    slopes = torch.einsum("nto,nti,oi->n", probes.gradients, probes.inputs, error)
    predicted = float(0.5 * (probes.weights * slopes.square()).sum() / LENGTH)
    weight = small.get_submodule(layer).weight
    with torch.no_grad():
        log_p = small(row[None]).logits[0].log_softmax(-1)
        original = weight.clone()
        weight.add_(error)
        log_q = small(row[None]).logits[0].log_softmax(-1)
        weight.copy_(original)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert kl > 1e-9
    assert 0.95 < predicted / kl < 1.05


def slow_scores(inputs: Tensor, grads: Tensor, error: Tensor) -> dict[str, float]:
    rows, length, width = inputs.shape
    height = grads.shape[2]
    fisher = projection = trace = 0.0
    power, second_moment = torch.zeros(height, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for n in range(rows):
        gradient = torch.zeros(height, width, dtype=torch.float64)
        for t in range(length):
            gradient += torch.outer(grads[n, t].double(), inputs[n, t].double())
            power += grads[n, t].double() ** 2 / (rows * length)
            second_moment += torch.outer(inputs[n, t].double(), inputs[n, t].double()) / (rows * length)
        fisher += float((gradient * error.double()).square().sum()) / (2 * length * rows)
        projection += sum(float(gradient[r] @ error[r].double()) ** 2 for r in range(height)) / (2 * length * rows)
        trace += float(gradient.square().sum()) / rows
    norm = float(error.double().square().sum())
    kron = sum(float(power[r] * (error[r].double() @ second_moment @ error[r].double())) for r in range(height)) / 2
    ggn = 0.5 * trace / (length * height * width) * norm
    return {"fisher": fisher, "hawq-ggn": ggn, "kron": kron, "projection": projection}


def test_score_rows_equals_slow_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, grads = torch.randn(4, 6, 10, generator=generator), torch.randn(4, 6, 7, generator=generator)
    errors = {"a": torch.randn(7, 10, generator=generator), "b": 0.1 * torch.randn(7, 10, generator=generator)}
    values = score_rows([layer_rows(inputs, grads)], [errors])[0]
    assert all(len(rows) == 4 for by_label in values.values() for rows in by_label.values())
    for label, error in errors.items():
        expected = slow_scores(inputs, grads, error)
        for metric in METRICS:
            assert float(values[metric][label].mean()) == pytest.approx(expected[metric], rel=1e-5)
        signed = torch.stack([(g.t() @ x * error).sum() for x, g in zip(inputs, grads, strict=True)])
        torch.testing.assert_close(values[SIGNED][label].float(), signed / inputs.shape[1] ** 0.5, rtol=1e-5, atol=1e-6)


def test_layers_that_share_a_wide_input_equal_slow_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several panels of the second moments, batches of rows and chunks of outputs; two layers at once."""
    width, heights = GRAM_PANEL + 44, (7, 4)
    monkeypatch.setattr(scores, "_CHUNK_ELEMENTS", 2 * width)
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(5, 6, width, generator=generator)
    grads = [torch.randn(5, 6, height, generator=generator) for height in heights]
    errors = [{"a": torch.randn(h, width, generator=generator), "b": torch.ones(h, width)} for h in heights]
    found = score_rows([layer_rows(inputs, g) for g in grads], errors)
    for values, g, by_label in zip(found, grads, errors, strict=True):
        for label, error in by_label.items():
            expected = slow_scores(inputs, g, error)
            for metric in METRICS:
                assert float(values[metric][label].mean()) == pytest.approx(expected[metric], rel=1e-5)
            # What a row adds to the product of two means, to first order.
            power, seen = g.double().square().mean(1), (inputs.double() @ error.double().t()).square().mean(1)
            linear = power @ seen.mean(0) + seen @ power.mean(0) - power.mean(0) @ seen.mean(0)
            torch.testing.assert_close(values["kron"][label], linear / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [5, GRAM_PANEL, 2 * GRAM_PANEL + 3])
def test_a_gram_matrix_is_the_mean_of_outer_products(width: int) -> None:
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(1))
    found = gram(x)
    torch.testing.assert_close(found.double(), x.double().t() @ x.double() / 40, rtol=1e-5, atol=1e-6)


def test_labels_follow_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    count = 20000
    drawn = draw_labels(probabilities.expand(count, -1), torch.Generator().manual_seed(2))
    shares = torch.bincount(drawn, minlength=len(probabilities)) / count
    assert shares[probabilities == 0].sum() == 0
    assert float((shares - probabilities).abs().max()) < 4 * (0.25 / count) ** 0.5


# The streamed measurement against a whole model that is held at once.


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_model("qwen2", folder, dtype=torch.float32)
    return prepare(RunConfig(model=str(folder), device="cpu"))


def tokens(seed: int, rows: int) -> Tensor:
    return torch.randint(0, 128, (rows, 24), generator=torch.Generator().manual_seed(seed))


CALIBRATION, SCORING, SEED = tokens(11, 6), tokens(12, 5), 7


def measured(job: Job, method: str, batch_size: int) -> dict[str, UnitScores]:
    menu = {unit.name: FORMATS for unit in job.units}
    return measure(
        job.stream(),
        MeasurementRows(Rows(CALIBRATION, "test", "-"), SCORING, batch_size),
        RoundingSpec(RoundingMethod(method), menu, job.stored_dtypes),
        SweepSettings(SEED, math.inf),
        lambda *_: None,
    ).scores


class Watch:
    """Inputs and outputs of every quantizable linear of a live model."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name in job.structure.linears:
            model.get_submodule(name).register_forward_hook(lambda _m, i, o, name=name: self._see(name, i[0], o))

    def _see(self, name: str, inputs: Tensor, output: Tensor) -> None:
        self.inputs[name], self.outputs[name] = inputs.detach(), output


def whole_model_errors(job: Job, model: nn.Module, watch: Watch, method: str) -> dict[str, dict[str, Tensor]]:
    with torch.no_grad():
        model(CALIBRATION)
    errors = {}
    for name in job.structure.linears:
        x = watch.inputs[name].flatten(0, 1)
        factor = factorize(x.t() @ x / len(x), len(x))
        weight = model.get_submodule(name).weight.detach()
        tasks = [Task(name, weight, fmt, torch.float32) for fmt in FORMATS]
        rounded = round_group(tasks, factor, RoundingMethod(method))
        errors[name] = {f.label: dequantize(*r) - weight for f, r in zip(FORMATS, rounded, strict=True)}
    return errors


def whole_model_scores(job: Job, method: str) -> dict[str, dict[str, dict[str, float]]]:
    """Whole model in memory, one backward over all rows, labels of the same generator."""
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32).eval().requires_grad_(True)
    watch = Watch(model, job)
    errors = whole_model_errors(job, model, watch, method)
    generator = torch.Generator().manual_seed(SEED)
    logits = model(SCORING).logits
    labels = torch.stack([draw_labels(z.detach().softmax(-1), generator) for z in logits])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    names = list(job.structure.linears)
    grads = dict(zip(names, torch.autograd.grad(loss, [watch.outputs[n] for n in names]), strict=True))
    table: dict[str, dict[str, dict[str, float]]] = {m: {} for m in METRICS}
    for unit in job.units:
        for fmt in FORMATS:
            parts = [slow_scores(watch.inputs[m.name], grads[m.name], errors[m.name][fmt.label]) for m in unit.members]
            for metric in METRICS:
                table[metric].setdefault(unit.name, {})[fmt.label] = sum(p[metric] for p in parts)
    return table


@pytest.mark.parametrize(("method", "tolerance"), [("rtn", 1e-4), ("gptq", 5e-3)])
def test_streamed_scores_equal_a_whole_model_backward(job: Job, method: str, tolerance: float) -> None:
    expected, found = whole_model_scores(job, method), measured(job, method, len(SCORING))
    assert set(found) == set(METRICS)
    for metric in METRICS:
        assert set(found[metric]) == {unit.name for unit in job.units}
        for unit, by_label in found[metric].items():
            assert set(by_label) == {f.label for f in FORMATS}
            for label, score in by_label.items():
                assert score.value == pytest.approx(expected[metric][unit][label], rel=tolerance), (metric, unit)


def test_scores_do_not_depend_on_slices(job: Job) -> None:
    whole, sliced = measured(job, "rtn", 6), measured(job, "rtn", 2)
    for metric in METRICS:
        for unit in whole[metric]:
            for label, score in whole[metric][unit].items():
                other = sliced[metric][unit][label]
                assert other.value == pytest.approx(score.value, rel=1e-4)
                assert other.stderr == pytest.approx(score.stderr, rel=1e-3)


def test_gram_matrices_are_the_same_kept_or_found_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_GRAM_SHARE", 1000)
    kept = measured(job, "gptq", 2)
    monkeypatch.setattr(sweeps, "_GRAM_SHARE", 0)
    assert measured(job, "gptq", 2) == kept


def test_wider_formats_score_lower_and_units_can_be_skipped(job: Job) -> None:
    kept = job.units[0].name
    found = measure(
        job.stream(),
        MeasurementRows(Rows(CALIBRATION, "test", "-"), SCORING, 3),
        RoundingSpec(RoundingMethod("gptq"), {kept: FORMATS}, job.stored_dtypes),
        SweepSettings(SEED, math.inf),
        lambda *_: None,
    ).scores
    for metric in METRICS:
        scores = found[metric][kept]
        assert scores["w2g32"].value > scores["w3g32"].value > scores["w8g32"].value > 0
        assert not any(found[metric].get(unit.name) for unit in job.units[1:])


def test_measuring_leaves_the_checkpoint_alone(job: Job) -> None:
    before = {f: f.stat().st_mtime_ns for f in Path(job.index.folder).iterdir()}
    measured(job, "rtn", 6)
    assert before == {f: f.stat().st_mtime_ns for f in Path(job.index.folder).iterdir()}


# Rows whose tokens share one output.


def test_only_projection_counts_errors_that_add_up_over_the_tokens_of_a_row() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, length, width, height = 4000, 16, 12, 10
    # As under mean pooling: one direction for all tokens of a row, and inputs with a common part.
    inputs = 1 + 0.3 * torch.randn(rows, length, width, generator=generator)
    grads = torch.randn(rows, 1, height, generator=generator).expand(rows, length, height) / length
    error = torch.randn(height, width, generator=generator)
    loss = float((inputs @ error.t()).mean(1).square().sum(1).mean()) / 2
    found = to_scores(score_rows([LayerRows(zip(inputs, grads, strict=True), length, 1)], [{"e": error}])[0])
    assert found["projection"]["e"].value == pytest.approx(loss, rel=0.05)
    assert found["kron"]["e"].value < loss / 10


def test_what_auto_takes() -> None:
    assert RunConfig(model="m").metric == "projection"
    assert RunConfig(model="m", rounding="rtn").metric == "fisher"
    assert RunConfig(model="m", sensitivity="kron").metric == "kron"


@pytest.mark.parametrize("metric", SWEEP_METRICS)
def test_a_metric_alone_is_the_one_among_all(metric: str) -> None:
    errors = [{"w3g32": torch.randn(8, 32), "w4g32": torch.randn(8, 32)} for _ in range(2)]
    rows = [[(torch.randn(6, 32), torch.randn(6, 8)) for _ in range(3)] for _ in range(2)]
    layers = [LayerRows(found, 6, 6) for found in rows]
    for every, alone in zip(score_rows(layers, errors), score_rows(layers, errors, (metric,)), strict=True):
        assert set(alone) == ({metric} if metric == "kron" else {metric, SIGNED})
        for label, values in alone[metric].items():
            assert torch.equal(values, every[metric][label])
