"""Plans whose layers are rounded one by one against whole models that are held at once, in float64 where it can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.evaluation.plan_divergence import Calibration, plan_divergences
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import MeasurementRows, Rows
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import round_group
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.sensitivity.measure import SweepSettings, measure
from hawqtool.streaming.kept_roundings import KeptRoundings
from hawqtool.streaming.stream import ModelStream
from tests.support.crew import by_crew
from tests.support.tiny_zoo import kind_named, save_kind

LOW, HIGH = QuantFormat(2, 32), QuantFormat(4, 32)


def tokens(seed: int, rows: int) -> Tensor:
    return torch.randint(0, 128, (rows, 24), generator=torch.Generator().manual_seed(seed))


CALIBRATION, JUDGED = tokens(1, 7), tokens(2, 5)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = save_kind(kind_named(request.param), tmp_path_factory.mktemp(request.param), torch.float32)
    head = request.param == "llama"
    return prepare(RunConfig(model=str(folder), group_size=32, device="cpu", batch_size=3, quantize_lm_head=head))


def plans_of(job: Job) -> dict[str, Any]:
    units = [unit.name for unit in job.units]
    mixed = {unit: LOW if number % 2 else HIGH for number, unit in enumerate(units)}
    return {"mixed": mixed, "uniform": dict.fromkeys(units, LOW)}


def divergences(job: Job, ranks: Ranks = ALONE, kept: KeptRoundings | None = None) -> dict[str, Tensor]:
    own, stream = ranks.share(len(JUDGED)), job.stream()
    states = stream.final_hidden(JUDGED, 3, lambda _: None)[own]
    menu = {unit.name: (LOW, HIGH) for unit in job.units}
    comparison = OutputComparison(stream, job.stream(), JUDGED[own], states)
    known = Calibration(Rows(CALIBRATION, "test", "-"), 3, kept)
    return plan_divergences(comparison, known, job.rounding(menu), plans_of(job), lambda *_: None, ranks)


def whole(job: Job, weights: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the model with some weights replaced, in float64."""
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        return model(JUDGED).logits.log_softmax(-1)


def test_a_plan_is_a_model_of_layers_rounded_on_the_originals_inputs(job: Job) -> None:
    if job.structure.head is None:
        pytest.skip("experts are shown tokens of others too, so that their statistics are no plain sums")
    seen: dict[str, list[Tensor]] = {}
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float32).eval()
    for name in job.structure.linears:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, x, name=name: seen.setdefault(name, []).append(x[0].flatten(0, -2))
        )
    with torch.no_grad():
        model(CALIBRATION)
    method, found = replace(job.settings.method, passes=1), divergences(job)
    for plan, formats in plans_of(job).items():
        weights = {}
        for linear in job.structure.linears.values():
            x = torch.cat(seen[linear.name])
            factor = factorize(x.t() @ x, len(x), method.damping, name=linear.name)
            task = Task(linear.name, model.get_submodule(linear.name).weight, formats[linear.unit], torch.float32)
            with torch.no_grad():
                weights[linear.name] = dequantize(*round_group([task], factor, method)[0])
        p, q = whole(job, {}), whole(job, weights)
        expected = (p.exp() * (p - q)).sum(-1).mean(-1)
        # A code that lies on a tie may fall to either side where sums go in another order.
        torch.testing.assert_close(found[plan], expected, rtol=2e-2, atol=1e-6)
    assert float((found["uniform"] - found["mixed"]).mean()) > 0


def test_ranks_compare_plans_as_one_process_does(job: Job) -> None:
    """Rounded to nearest, so that no code depends on the order of sums; experts lack other tokens in other batches."""
    nearest = replace(job, settings=replace(job.settings, method=RoundingMethod("rtn")))
    share = 1e-4 if job.structure.head else 0.1
    expected = divergences(nearest)
    for found in by_crew(2, lambda ranks: divergences(replace(nearest, ranks=ranks), ranks)):
        assert found.keys() == expected.keys()
        for plan, rows in expected.items():
            torch.testing.assert_close(found[plan], rows, rtol=share, atol=1e-7)


@pytest.mark.parametrize("kept_blocks", [(0, 1), (1,), (0,)])
def test_roundings_that_measuring_made_serve_as_well(
    job: Job, kept_blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device had no room for is made again; weights that nothing is computed with are not read."""
    menu, kept = {unit.name: (LOW, HIGH) for unit in job.units}, KeptRoundings()
    rows = MeasurementRows(Rows(CALIBRATION, "test", "-"), JUDGED, 3)
    settings = SweepSettings(0, metrics=("projection",), kept=kept)
    measure(job.stream(), rows, job.rounding(menu), settings, lambda *_: None)
    for index in {0, 1}.difference(kept_blocks):
        kept.take(index)
    assert [kept.covers(spec, plans_of(job)) for spec in job.structure.blocks] == [i in kept_blocks for i in (0, 1)]
    expected, load, left_out = divergences(job), ModelStream._load, set[str]()

    def spied(stream: ModelStream, module: nn.Module, prefix: str, skip: Any = (), **more: Any) -> None:
        load(stream, module, prefix, skip, **more)
        if prefix and skip:
            left_out.add(prefix)
            assert {name for name, p in module.named_parameters() if p.device.type == "meta"} == set(skip)

    monkeypatch.setattr(ModelStream, "_load", spied)
    found = divergences(job, kept=kept)
    for plan, rows_of_plan in expected.items():
        torch.testing.assert_close(found[plan], rows_of_plan, rtol=1e-3, atol=1e-7)
    first = 2 if job.structure.head else max({0, 1}.difference(kept_blocks), default=-1) + 1
    assert left_out == {*job.structure.inside[first:]}  # behind the last block that is rounded here
    assert not any(kept.covers(spec, plans_of(job)) for spec in job.structure.blocks)


def test_ranks_make_again_what_one_of_them_had_no_room_for(job: Job) -> None:
    nearest = replace(job, settings=replace(job.settings, method=RoundingMethod("rtn")))
    menu = {unit.name: (LOW, HIGH) for unit in job.units}
    rows = MeasurementRows(Rows(CALIBRATION, "test", "-"), JUDGED, 3)

    def compared(ranks: Ranks) -> dict[str, Tensor]:
        kept = KeptRoundings()
        settings = SweepSettings(0, metrics=("projection",), ranks=ranks, kept=kept)
        measure(nearest.stream(), rows, nearest.rounding(menu), settings, lambda *_: None)
        assert all(kept.covers(spec, plans_of(job)) for spec in job.structure.blocks)
        if ranks.leads:
            kept.take(0)
        return divergences(replace(nearest, ranks=ranks), ranks, kept)

    expected = by_crew(2, lambda ranks: divergences(replace(nearest, ranks=ranks), ranks))[0]
    for found in by_crew(2, compared):
        for plan, values in expected.items():
            assert torch.equal(found[plan], values)
