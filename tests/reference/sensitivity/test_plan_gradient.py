"""Predicted changes at a quantized plan against automatic differentiation of whole models in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp, vmap
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import MeasurementRows, Rows
from hawqtool.sensitivity import plan_gradient
from hawqtool.sensitivity.plan_gradient import PlanChanges, Reference, plan_changes, round_formats
from hawqtool.streaming.spliced import SplicedModel
from tests.support.tiny import tiny_llama

VOCAB, PRESENT, OTHERS = 16, QuantFormat(3, 32), (QuantFormat(2, 32), QuantFormat(4, 32))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    model = tiny_llama(tmp_path_factory.mktemp("plan") / "model", vocab_size=VOCAB, dtype=torch.float32)
    config = RunConfig(model=str(model), group_size=32, device="cpu", target_shift="off", num_samples=8, seq_len=16)
    return prepare(config).with_batch_size(3)


@pytest.fixture(scope="module")
def spliced(job: Job) -> SplicedModel:
    tokens = torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(1))
    rows = MeasurementRows(Rows(tokens, "random", ""), tokens, 3)
    menu = {unit.name: (PRESENT, *OTHERS) for unit in job.units}
    store = round_formats(job.stream(), job.stream(), rows, job.rounding(menu), None, lambda *_: None)
    return SplicedModel(job.stream(), store, {unit.name: PRESENT for unit in job.units})


def weights(job: Job, model: SplicedModel, label: str) -> dict[str, Tensor]:
    """Dequantized weights of all linears in float64, by the name of the parameter."""
    return {
        f"{name}.weight": model.store.block(linear.block).weight(name, label).double()
        for name, linear in job.structure.linears.items()
    }


def model64(job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64, attn_implementation="eager")


def reference(job: Job, tokens: Tensor) -> Reference:
    stream = job.stream()
    return Reference(stream, tokens, stream.final_hidden(tokens, 3, lambda _: None))


def changes(job: Job, model: SplicedModel, tokens: Tensor, limit: float = math.inf) -> PlanChanges:
    menu = {unit.name: (PRESENT, *OTHERS) for unit in job.units}
    return plan_changes(reference(job, tokens), model, 3, menu, 0, lambda *_: None, limit)


def test_the_first_order_is_the_gradient_of_the_true_divergence(job: Job, spliced: SplicedModel) -> None:
    tokens = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(2))
    found, whole = changes(job, spliced, tokens), model64(job)
    present = {name: value.requires_grad_() for name, value in weights(job, spliced, PRESENT.label).items()}
    for number, row in enumerate(tokens):
        log_p = whole(row[None]).logits.log_softmax(-1).detach()
        log_q = functional_call(whole, present, (row[None],)).logits.log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        gradients = dict(zip(present, torch.autograd.grad(loss, list(present.values())), strict=True))
        for unit, fmt in itertools.product(job.units, OTHERS):
            moved = weights(job, spliced, fmt.label)
            members = [f"{member.name}.weight" for member in unit.members]
            expected = float(sum((gradients[n] * (moved[n] - present[n].detach())).sum() for n in members))
            assert float(found.first[unit.name][fmt.label][number]) == pytest.approx(expected, rel=2e-3, abs=2e-7)
    assert set(found.first) == {unit.name for unit in job.units}
    assert all(set(by_label) == {fmt.label for fmt in OTHERS} for by_label in found.first.values())


def test_both_terms_together_predict_what_single_moves_do(job: Job, spliced: SplicedModel) -> None:
    tokens = torch.randint(VOCAB, (32, 16), generator=torch.Generator().manual_seed(4))
    known, scores = reference(job, tokens), changes(job, spliced, tokens).scores()
    comparison = OutputComparison(known.original, spliced.stream, tokens, known.states)
    before = comparison.divergence(spliced.final_hidden(tokens, 8))
    pairs = []
    for unit, fmt in itertools.product(job.units, OTHERS):
        moved = replace(spliced, formats={**spliced.formats, unit.name: fmt})
        change = comparison.divergence(moved.final_hidden(tokens, 8)) - before
        pairs.append((scores[unit.name][fmt.label].value, float(change.mean())))
    predicted, true = torch.tensor(pairs).t()
    assert float(torch.corrcoef(torch.stack([predicted, true]))[0, 1]) > 0.95
    narrower, wider = predicted[::2].sum() / true[::2].sum(), predicted[1::2].sum() / true[1::2].sum()
    assert 0.7 < narrower < 1.4 and 0.6 < wider < 1.6


def test_the_curvature_is_the_gauss_newton_one_over_all_labels(
    job: Job, spliced: SplicedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is there once for every pair of labels, each weighted by how likely the quantized model draws it."""
    row, whole = torch.tensor([5, 11]), model64(job)
    present = weights(job, spliced, PRESENT.label)
    q = functional_call(whole, present, (row[None],)).logits[0].softmax(-1).detach()
    pairs = list(itertools.product(range(VOCAB), repeat=2))
    labels = iter(pairs)
    monkeypatch.setattr(plan_gradient, "draw_labels", lambda *_: torch.tensor(next(labels)))
    found = changes(job, spliced, row.expand(len(pairs), 2))
    likely = torch.tensor([float(q[0, first] * q[1, second]) for first, second in pairs], dtype=torch.float64)
    for unit, fmt in itertools.product(job.units[:3], OTHERS):
        expected = sum(curvature(whole, present, weights(job, spliced, fmt.label), f"{m.name}.weight", row, q)
                       for m in unit.members)  # fmt: skip
        mean = float((likely * found.curvature[unit.name][fmt.label]).sum())
        assert mean == pytest.approx(expected, rel=2e-3), (unit.name, fmt.label)


def curvature(
    whole: Any, present: dict[str, Tensor], moved: dict[str, Tensor], name: str, row: Tensor, q: Tensor
) -> float:
    """½ Σ_r D_rᵀ F_rr D_r per output, F being the Gauss-Newton matrix of an output channel, in float64."""
    error = moved[name] - present[name]

    def along(channel: Tensor) -> Tensor:
        step = torch.zeros_like(error).index_copy(0, channel[None], error.index_select(0, channel[None]))
        run = lambda weight: functional_call(whole, present | {name: weight}, (row[None],)).logits[0]  # noqa: E731
        return jvp(run, (present[name],), (step,))[1]

    change = vmap(along)(torch.arange(len(error)))
    variance = (q * change.square()).sum(-1) - (q * change).sum(-1).square()
    return float(variance.detach().sum()) / (2 * len(row))


def test_memory_and_batches_change_nothing(job: Job, spliced: SplicedModel, tmp_path: Path) -> None:
    from hawqtool.streaming.offload import Offload

    tokens = torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(1))
    small = replace(job, offload=Offload(job.device, 0, 0, tmp_path))
    rows = MeasurementRows(Rows(tokens, "random", ""), tokens, 3)
    menu = {unit.name: (PRESENT, *OTHERS) for unit in job.units}
    store = round_formats(small.stream(), small.stream(), rows, job.rounding(menu), small.offload, lambda *_: None)
    model = SplicedModel(small.stream(), store, spliced.formats)
    first, again = changes(job, spliced, tokens[:4], 4.0), changes(small, model, tokens[:4], 4.0)
    for unit, by_label in first.first.items():
        for label in by_label:
            assert torch.equal(first.rows(unit, label), again.rows(unit, label))
