"""Loss along the rounding error against whole models with those weights and against dense Fisher matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.formats import QuantFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.sensitivity.curvature.loss_along_error import SCALES, LossAlong, loss_along
from tests.reference.sensitivity.test_measured_kl import NARROW, Overlay, errors_of
from tests.support.tiny import tiny_model
from tests.support.tiny_zoo import kind_named, save_kind

RTN = RoundingMethod("rtn", both_signs=False)
VOCAB, LENGTH, ROWS, BITS = 24, 6, 3, 3


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("along") / "model"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny_model("llama", folder, dtype=torch.float32, vocab_size=VOCAB, initializer_range=0.3, **sizes)
    return prepare(RunConfig(model=str(folder), device="cpu", group_size="channel", quantize_lm_head=True))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def whole(job: Job) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval().requires_grad_(False)


def along(job: Job, rows: Tensor, **changes: Any) -> LossAlong:
    rounding = RoundingSpec.of_plan(RTN, {unit.name: QuantFormat(BITS, 0) for unit in job.units}, job.stored_dtypes)
    return loss_along(job.stream(dtype=torch.float64), None, rows, rounding, 2, lambda *_: None, **changes)


@pytest.fixture(scope="module")
def found(job: Job, tokens: Tensor) -> LossAlong:
    return along(job, tokens)


@pytest.fixture(scope="module")
def errors(job: Job, tokens: Tensor) -> dict[str, Tensor]:
    """The D that is followed, by name of the weight."""
    seen: dict[str, Tensor] = {}

    def watching(block: LoadedBlock, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.update({f"{name}.weight": change.double() for name, change in changes.items()})
        return shifted(block, changes)

    shifted = LoadedBlock.shifted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedBlock, "shifted", watching)
        along(job, tokens[:1], scales=(0.0, 1.0))
    return seen


def least_error(weight: Tensor) -> Tensor:
    """Squared error per row of rounding to nearest with the best of very many positive scales."""
    least = torch.full((len(weight), 1), torch.inf, dtype=weight.dtype)
    for share in torch.linspace(0.2, 1.3, 2201, dtype=weight.dtype):
        scale = share * weight.abs().amax(1, keepdim=True) / 2 ** (BITS - 1)
        codes = (weight / scale).round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
        least = torch.minimum(least, (codes * scale - weight).square().sum(1, keepdim=True))
    return least


def test_what_is_followed_is_the_rounding_error_of_the_best_scales(
    job: Job, whole: nn.Module, errors: dict[str, Tensor]
) -> None:
    assert set(errors) == {f"{m.name}.weight" for unit in job.units for m in unit.members}
    for name, error in errors.items():
        weight = whole.get_parameter(name)
        assert float(error.square().sum()) == pytest.approx(float(least_error(weight).sum()), rel=0.02), name
        for row in weight + error:  # on a grid of few equal steps
            assert len(row.float().unique()) <= 2**BITS


def row_divergence(whole: nn.Module, row: Tensor, weights: dict[str, Tensor]) -> Tensor:
    log_p = whole(row[None]).logits[0].log_softmax(-1)
    log_q = torch.func.functional_call(whole, weights, (row[None],)).logits[0].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_it_equals_whole_models_with_those_weights(
    whole: nn.Module, tokens: Tensor, found: LossAlong, errors: dict[str, Tensor]
) -> None:
    weights = dict(whole.named_parameters())
    assert found.scales == SCALES and not bool(found.divergence[0].any())
    for scale, divergence in zip(found.scales[1:], found.divergence[1:], strict=True):
        moved = {name: weights[name] + scale * error for name, error in errors.items()}
        expected = torch.stack([row_divergence(whole, row, moved) for row in tokens])
        # Norms inside and the comparison of logits are in float32.
        assert torch.allclose(divergence, expected, rtol=1e-4, atol=1e-7), scale


def test_the_prediction_is_half_the_error_through_the_dense_fisher_matrix(
    whole: nn.Module, tokens: Tensor, found: LossAlong, errors: dict[str, Tensor]
) -> None:
    weights = {name: whole.get_parameter(name).clone() for name in errors}
    flat = torch.cat([error.flatten() for error in errors.values()])
    for row, quadratic in zip(tokens, found.quadratic.tolist(), strict=True):

        def logits(values: dict[str, Tensor], row: Tensor = row) -> Tensor:
            return torch.func.functional_call(whole, values, (row[None],)).logits[0]

        parts = torch.func.jacrev(logits)(weights)
        jacobian = torch.cat([parts[name].flatten(2) for name in errors], 2)
        p = logits(weights).softmax(-1)
        inner = p.diag_embed() - p[:, :, None] * p[:, None]
        fisher = torch.einsum("tvn,tvw,twm->nm", jacobian, inner, jacobian) / LENGTH
        assert quadratic == pytest.approx(0.5 * float(flat @ fisher @ flat), rel=1e-5)


def test_small_steps_cost_what_is_predicted_and_large_ones_break_it(job: Job, tokens: Tensor, found: LossAlong) -> None:
    small = along(job, tokens, scales=(0.0, 1 / 128, 1 / 64))
    for scale, divergence in zip(small.scales[1:], small.divergence[1:], strict=True):
        # The next term is of third order; float32 logits limit the agreement at small steps.
        assert torch.allclose(divergence, scale**2 * small.quadratic, rtol=0.1)
    assert small.breaks_at is None and torch.equal(small.quadratic, found.quadratic)


def test_where_the_quadratic_breaks() -> None:
    quadratic = torch.tensor([0.5, 1.5], dtype=torch.float64)
    divergence = torch.tensor([[0.0, 0.0], [0.24, 0.24], [0.5, 0.9], [3.0, 3.0]], dtype=torch.float64)
    assert LossAlong((0.0, 0.5, 1.0, 1.25), divergence, quadratic).breaks_at == 1.0
    assert LossAlong((0.0, 0.5), divergence[:2], quadratic).breaks_at is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"quantize_lm_head": True}),
        ("gpt2", {"profile": "vllm"}),  # transposed weights
        ("qwen3-moe", {}),
        ("bert", {}),  # an embedding
        ("vit", {}),  # one output per row
    ],
)
def test_at_one_it_is_the_quantized_model(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """With compensated rounding, guided by Gram matrices of calibration rows."""
    folder = save_kind(kind_named(kind), tmp_path / "model", torch.float32)
    job = prepare(RunConfig(model=str(folder), device="cpu", **settings))
    generator = torch.Generator().manual_seed(2)
    if job.row_format.values is not None:
        size = job.skeleton.config.image_size
        calibration, rows = (torch.randn(n, 3, size, size, generator=generator) for n in (8, 5))
    else:
        calibration, rows = (torch.randint(2, 120, (n, 32), generator=generator) for n in (8, 5))
    rounding = job.rounding({unit.name: (NARROW,) for unit in job.units})
    rounding = replace(rounding, method=RoundingMethod("gptq"))
    found = loss_along(job.stream(), calibration, rows, rounding, 64, lambda *_: None, (0.0, 1 / 64, 1.0))
    reader, stream, rounded = TensorReader(job.index), job.stream(), errors_of(job, calibration)
    weights = {}
    for member in (m for unit in job.units for m in unit.members):
        weight, error = reader.tensor(f"{member.name}.weight"), rounded[member.name][NARROW.label]
        weights[f"{member.name}.weight"] = weight + (error.t() if member.transposed else error)
    candidate = job.stream(Overlay(job, weights))
    with torch.no_grad():
        original, hidden = (s.final_hidden(rows, 64, lambda _: None) for s in (stream, candidate))
    expected = OutputComparison(stream, candidate, rows, original).evaluation(hidden)
    assert float(found.divergence[0].abs().max()) == 0
    assert found.divergence[-1].tolist() == pytest.approx(list(expected.row_divergence), rel=1e-4, abs=1e-7)
    if kind != "qwen3-moe":  # a token that changes its experts is a jump, which no quadratic has
        predicted = float(found.quadratic.mean()) / 64**2
        assert float(found.divergence[1].mean()) == pytest.approx(predicted, rel=0.3, abs=1e-6)
