"""A row whose gradient explodes on its way down counts in a measurement as far as the limit lets it, and no further."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import MeasurementRows, Rows
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.sensitivity import token_importance
from hawqtool.sensitivity.gradient_limit import GRADIENT_LIMIT
from hawqtool.sensitivity.label_gradients import draw_labels
from hawqtool.sensitivity.measure import Measurement, SweepSettings, measure
from tests.support.importance64 import slow_importance
from tests.support.tiny import tiny_model

ROWS, LENGTH, SEED, EXPLODING, TOKEN = 6, 16, 3, 2, 7
SMALL = 1e-2


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The first block adds little, and one token's embedding is small: what enters the second block is, too."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("limit") / "model", torch.float32, layers=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][TOKEN] *= SMALL
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"] *= SMALL
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return prepare(RunConfig(model=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    found = torch.randint(10, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    found[EXPLODING, 3] = TOKEN
    return found


def measured(job: Job, tokens: Tensor, limit: float) -> Measurement:
    menu = {unit.name: (QuantFormat(2, 32),) for unit in job.units}
    calibration = torch.randint(10, 128, (8, LENGTH), generator=torch.Generator().manual_seed(5))
    rows = MeasurementRows(Rows(calibration, "test", "-"), tokens, 4)
    rounding = RoundingSpec(RoundingMethod("gptq"), menu, job.stored_dtypes)
    return measure(job.stream(), rows, rounding, SweepSettings(SEED, limit), lambda *_: None)


def powers(job: Job, tokens: Tensor) -> Tensor:
    """‖g‖² of every row at the outputs of the blocks, ``[blocks, rows]``, of a live model in float64."""
    model = AutoModelForCausalLM.from_pretrained(job.index.folder, dtype=torch.float64).eval()
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    generator, found = torch.Generator().manual_seed(SEED), []
    for row in tokens:
        outputs.clear()
        logits = model(row[None], use_cache=False).logits[0]
        labels = draw_labels(logits.detach().float().softmax(-1), generator)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        found.append([float(output.grad.square().sum()) for output in outputs if output.grad is not None])
    return torch.tensor(found).t()


def shares(powers: Tensor) -> Tensor:
    """What is left of each row's gradient at the blocks' outputs, ``[blocks, rows]``."""
    left, found = torch.ones(powers.shape[1]), [torch.ones(powers.shape[1])]
    for power in reversed(powers[:-1]):
        growth = power * left.square() / powers[-1]
        allowed = GRADIENT_LIMIT * growth.median()
        left = left * (allowed / growth).sqrt().clamp(max=1.0)
        found.append(left)
    return torch.stack(found[::-1])


def test_an_exploding_row_is_limited_to_twice_the_median_gradient(job: Job, tokens: Tensor) -> None:
    limited, free = (measured(job, tokens, limit) for limit in (GRADIENT_LIMIT, math.inf))
    expected = shares(powers(job, tokens))
    # Only that row, and only below the second block, where it would have had many times the others' gradients.
    assert expected[0, EXPLODING] < 0.5 and (expected < 1).sum() == 1
    assert (limited.shortened_rows, free.shortened_rows) == (1, 0)
    for unit in job.units:
        share = expected[unit.members[0].block]
        before, after = (torch.tensor(m.projections[unit.name]["w2g32"]) for m in (free, limited))
        torch.testing.assert_close(after, before * share, rtol=1e-4, atol=0, msg=unit.name)


def test_an_exploding_row_does_not_rule_the_importance(
    job: Job, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_importance, "_STORED", torch.float64)
    portions = token_importance.Portions(batch_size=4, room=0)  # the rows of two passes
    found = token_importance.token_importance(job.stream(), tokens, portions, SEED, lambda *_: None)
    start, limited = powers(job, tokens)[-1], set()
    for name, power in slow_importance(job, tokens, 1.0, SEED).items():  # ‖g‖², but for a factor
        growth = power.sum(1) / start
        share = (GRADIENT_LIMIT * growth.median() / growth).clamp(max=1.0)
        limited |= {(name.split(".")[2], row) for row in range(ROWS) if share[row] < 1}
        expected = (power * share[:, None]).sqrt()
        torch.testing.assert_close(found[name].double(), expected / expected.mean(), rtol=1e-3, atol=1e-3, msg=name)
    assert limited == {("0", EXPLODING)}
