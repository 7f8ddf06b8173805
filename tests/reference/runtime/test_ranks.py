"""Several ranks against one: the same importance, scores, rounding and evaluation, but for the order of sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.config import RunConfig
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.export.manifest import file_hash
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.stages.distill import DistilledModel, distill_model
from hawqtool.pipeline.stages.measure import _swept
from hawqtool.pipeline.stages.refine import BATCH_ROWS
from hawqtool.pipeline.stages.round_blocks import round_blocks
from hawqtool.pipeline.stages.token_importance import _importance
from hawqtool.pipeline.stages.write import Ahead, round_side_by_side, round_to_folder
from hawqtool.records import SWEEP_METRICS, BitPlan, MeasurementRows, RoundedLayer, Rows
from hawqtool.rounding.layer import quantized
from hawqtool.rounding.learned.block import Schedule
from hawqtool.rounding.learned.end_to_end import DistillSchedule
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.sensitivity import label_gradients
from hawqtool.sensitivity.measured_kl import single_unit_divergence
from hawqtool.sensitivity.width_swap import swap_divergence
from hawqtool.streaming import dealt
from tests.support.crew import by_crew
from tests.support.tiny_zoo import kind_named, save_kind

RANKS = 3
ROWS, LENGTH = 14, 24
"""Rows that three ranks cannot share alike."""
LOW, HIGH = QuantFormat(3, 32), QuantFormat(4, 32)


def tokens(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randint(0, 128, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = save_kind(kind_named(request.param), tmp_path_factory.mktemp(request.param), torch.float32)
    config = RunConfig(model=str(folder), group_size=32, device="cpu", foem_beta="auto", output_feedback="auto")
    return prepare(config)


@pytest.fixture(autouse=True)
def likeliest_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that no rank draws by a generator of its own."""
    monkeypatch.setattr(label_gradients, "draw_labels", lambda probabilities, _: probabilities.argmax(-1))


def importance_of(job: Job, ranks: Ranks) -> Any:
    return _importance(replace(job, ranks=ranks), tokens(1), sorted(job.feedback_layers))


def test_importance_and_moments_are_those_of_one_process(job: Job) -> None:
    (importance, moments), others = importance_of(job, ALONE), by_crew(RANKS, lambda ranks: importance_of(job, ranks))
    shared, sums = others[0]
    for none, same in others[1:]:
        assert none == {} and same.keys() == sums.keys()
        assert all(same[name].lower is values.lower for name, values in sums.items())
    assert shared.keys() == importance.keys() and sums.keys() == moments.keys() != set()
    for name, values in importance.items():
        torch.testing.assert_close(shared[name], values, rtol=1e-4, atol=1e-5)
    for name, values in moments.items():
        assert sums[name].damping == values.damping
        assert sums[name].ratio == pytest.approx(values.ratio, rel=1e-3)
        torch.testing.assert_close(sums[name].lower, values.lower, rtol=1e-3, atol=1e-4)


def test_scores_are_those_of_one_process(job: Job) -> None:
    """Rounded to nearest, so that no error depends on the order of sums."""
    menu, known = {unit.name: (LOW, HIGH) for unit in job.units}, Rows(tokens(1), "test", "-")
    nearest = replace(job, settings=replace(job.settings, method=RoundingMethod("rtn")))

    def swept(ranks: Ranks) -> Any:
        return _swept(replace(nearest, ranks=ranks), menu, known, tokens(2, 10), SWEEP_METRICS, False)

    expected, found = swept(ALONE), by_crew(RANKS, swept)[0]
    for metric, by_unit in expected.scores.items():
        for unit, by_label in by_unit.items():
            for label, score in by_label.items():
                other = found.scores[metric][unit][label]
                assert other.value == pytest.approx(score.value, rel=1e-3), (metric, unit)
                assert other.stderr == pytest.approx(score.stderr, rel=1e-3), (metric, unit)
    for unit, rows_by_label in expected.projections.items():
        for label, values in rows_by_label.items():
            assert found.projections[unit][label] == pytest.approx(values, rel=1e-2, abs=1e-6), unit
    assert found.shortened_rows == expected.shortened_rows
    assert found.input_fisher.keys() == expected.input_fisher.keys()
    for unit, score in expected.input_fisher.items():
        assert found.input_fisher[unit].value == pytest.approx(score.value, rel=1e-4)


class Layers:
    """Keeps what was rounded; gains of norms may change where that is said."""

    def __init__(self, changes: bool = False) -> None:
        self.found: dict[str, RoundedLayer] = {}
        self.changes = changes

    def write_layer(self, layer: RoundedLayer) -> None:
        self.found[layer.name] = layer

    def write_changed(self, name: str, tensor: Tensor) -> None:
        assert self.changes, name


def test_codes_are_those_of_one_process(job: Job) -> None:
    formats = {unit.name: LOW for unit in job.units}
    importance, moments = importance_of(job, ALONE)
    rows = Rows(tokens(1), "test", "-", importance, moments)

    def rounded(ranks: Ranks) -> tuple[dict[str, RoundedLayer], Any]:
        layers = Layers()
        findings = round_blocks(replace(job, ranks=ranks), formats, rows, layers, lambda *_: None)
        return layers.found, findings.layers

    expected, metrics = rounded(ALONE)
    shares = by_crew(RANKS, rounded)
    for found, told in shares:
        assert found.keys() == expected.keys() and told.keys() == metrics.keys()
        for name, layer in expected.items():
            assert torch.equal(found[name].codes, shares[0][0][name].codes)
            if metrics[name]["fallback"] is None and told[name]["fallback"] is None:
                assert told[name]["num_tokens"] == pytest.approx(metrics[name]["num_tokens"], abs=8)
                assert float((found[name].codes == layer.codes).double().mean()) > 0.97, name


def test_rows_of_one_layer_are_shared_and_rounded_as_by_one_process(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without output feedback, and with settings that no held-out rows choose, rows do not depend on each other."""
    routed = any(is_expert(member.name) for unit in job.units for member in unit.members)
    fixed = replace(job.settings, method=RoundingMethod("gptq", shift=0.0 if routed else 0.5))  # experts have no drift
    job = replace(job, settings=fixed, config=job.config.model_copy(update={"foem_beta": 0.1}))
    formats, rows = {unit.name: LOW for unit in job.units}, Rows(tokens(1), "test", "-", importance_of(job, ALONE)[0])
    heights: list[tuple[int, int]] = []
    share_of = dealt._rows_of

    def noted(task: Task, ranks: Ranks) -> Task:
        own = share_of(task, ranks)
        heights.append((len(own.weight), len(task.weight)))
        return own

    monkeypatch.setattr(dealt, "_rows_of", noted)

    def rounded(ranks: Ranks) -> tuple[dict[str, RoundedLayer], Any]:
        layers = Layers()
        findings = round_blocks(replace(job, ranks=ranks), formats, rows, layers, lambda *_: None)
        return layers.found, findings.layers

    expected, metrics = rounded(ALONE)
    assert not heights
    found, told = by_crew(RANKS, rounded)[0]
    assert heights and all(own < whole for own, whole in heights)
    for name, layer in expected.items():
        assert found[name].codes.shape == layer.codes.shape and found[name].codes.dtype == layer.codes.dtype
        if metrics[name]["fallback"] is None and told[name]["fallback"] is None:
            assert float((found[name].codes == layer.codes).double().mean()) > 0.97, name
            for key in ("output_error", "rtn_error", "predicted_error", "weight_error"):
                assert told[name][key] == pytest.approx(metrics[name][key], rel=0.02), (name, key)


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Rows that are learned from in one batch, so that several ranks take the steps of one; three are held out."""
    monkeypatch.setitem(BATCH_ROWS, "cpu", 64)
    return tokens(5, 24)


@pytest.mark.parametrize("job", ["llama"], indirect=True)
def test_refinement_learns_what_one_process_does(job: Job, one_batch: Tensor) -> None:
    formats, rows = {unit.name: LOW for unit in job.units}, Rows(one_batch, "test", "-")

    def refined(ranks: Ranks) -> tuple[dict[str, RoundedLayer], Any]:
        layers = Layers(changes=True)
        shared = replace(job, ranks=ranks)
        findings = round_blocks(shared, formats, rows, layers, lambda *_: None, Schedule(12, latent_rate=0.01))
        return layers.found, findings.refinement

    (_, expected), shares = refined(ALONE), by_crew(RANKS, refined)
    for layers, told in shares:
        assert all(torch.equal(layers[name].codes, shares[0][0][name].codes) for name in layers)
        for name, values in expected.items():
            assert values["error_after"] < values["error_before"]
            assert told[name]["error_before"] == pytest.approx(values["error_before"], rel=2e-2)
            assert told[name]["error_after"] == pytest.approx(values["error_after"], rel=2e-2)


@pytest.mark.parametrize("job", ["llama"], indirect=True)
def test_distillation_learns_what_one_process_does(job: Job, one_batch: Tensor) -> None:
    formats, rows, layers = {unit.name: LOW for unit in job.units}, Rows(one_batch, "test", "-"), Layers()
    round_blocks(job, formats, rows, layers, lambda *_: None)
    rounded = {name: quantized(layer) for name, layer in layers.found.items()}

    def distilled(ranks: Ranks) -> DistilledModel:
        context = RunContext(replace(job, ranks=ranks))
        return distill_model(context, formats, rounded, {}, one_batch, "", DistillSchedule(5, scale_rate=5e-3))

    expected, shares = distilled(ALONE), by_crew(RANKS, distilled)
    assert expected.record["error_after"] < expected.record["error_before"]
    for found in shares:
        assert found.record["error_before"] == pytest.approx(expected.record["error_before"], rel=1e-4)
        assert found.record["error_after"] == pytest.approx(expected.record["error_after"], rel=1e-2)
        for name, layer in expected.layers.items():
            torch.testing.assert_close(found.layers[name].scales, layer.scales, rtol=1e-3, atol=1e-6)


def test_plans_rounded_side_by_side_are_those_of_one_process_to_the_bit(job: Job, tmp_path: Path) -> None:
    """Two plans on three ranks: each is all one rank's, and the third has none."""
    rows = Rows(tokens(1), "test", "-")
    weights = sum(unit.num_weights for unit in job.units)
    plans = [BitPlan({unit.name: fmt for unit in job.units}, 0, weights) for fmt in (LOW, HIGH)]

    def rounded(ranks: Ranks) -> None:
        ahead = [Ahead(f"{n}", f"{n}", plan, tmp_path / f"{ranks.size}-{n}", False) for n, plan in enumerate(plans)]
        if ranks.leads:
            round_side_by_side(RunContext(job, ranks=ranks), ahead, rows)
            ranks.dismiss()
        else:
            ranks.serve(replace(job, ranks=ranks))

    by_crew(RANKS, rounded)
    for number, plan in enumerate(plans):
        alone = tmp_path / f"alone-{number}"
        round_to_folder(RunContext(job), plan, rows, alone, "alone")
        shared = tmp_path / f"{RANKS}-{number}"
        assert file_hash(shared / "model.safetensors") == file_hash(alone / "model.safetensors")


@pytest.mark.parametrize("job", ["llama"], indirect=True)
def test_swaps_and_single_units_are_measured_as_by_one_process(job: Job) -> None:
    """Rounded to nearest, so that no error depends on the order of sums; the model stands for a quantized one."""
    nearest = job.rounding({unit.name: (LOW,) for unit in job.units})
    nearest = replace(nearest, method=RoundingMethod("rtn"))
    rows = MeasurementRows(Rows(tokens(1), "test", "-"), tokens(2, 10), 4)

    def measured(ranks: Ranks) -> list[Any]:
        single = single_unit_divergence(job.stream(), rows, nearest, lambda *_: None, ranks=ranks)
        swaps = swap_divergence(job.stream(), job.stream(), rows, nearest, lambda *_: None, ranks=ranks)
        return [single, swaps]

    expected, shares = measured(ALONE), by_crew(RANKS, measured)
    for found in shares:
        for ours, theirs in zip(found, expected, strict=True):
            for unit, by_label in theirs.items():
                assert ours[unit][LOW.label].value == pytest.approx(by_label[LOW.label].value, rel=1e-3, abs=1e-7), unit


def test_an_evaluation_is_that_of_one_process(job: Job) -> None:
    rows, stream = tokens(3, 8), job.stream()
    states = stream.final_hidden(rows, 4, lambda _: None)
    noisy = states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(4))

    def judged(ranks: Ranks) -> Any:
        own = ranks.share(len(rows))
        first, second = job.stream(), job.stream()
        return OutputComparison(first, second, rows[own], states[own]).evaluation(noisy[own], ranks)

    expected = judged(ALONE)
    for found in by_crew(RANKS, judged):
        assert found.row_divergence == pytest.approx(expected.row_divergence, rel=1e-5)
        assert found.num_tokens == expected.num_tokens
        for name in ("divergence", "stderr", "perplexity", "same_top", "kl_p99", "kl_p999"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
