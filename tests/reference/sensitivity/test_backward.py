"""A block differentiated without the product of its last linear, against the whole block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hawqtool.config import RunConfig
from hawqtool.formats.activations import FP8_TOKEN, MXFP4
from hawqtool.pipeline.run.job import prepare
from hawqtool.rounding.floats.activations import fake_quantize
from hawqtool.sensitivity import backward
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind

# What is added to the hidden states comes last in these, but for the norm behind it where the name says so.
KINDS = {
    "gpt2": False,
    "opt-pre": True,
    "opt-post": False,
    "neox-parallel": True,
    "gemma2": False,
    "bert": False,
    "mixtral": False,
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_gradients_are_those_of_the_whole_block(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind_named(name)
    folder = save_kind(kind, tmp_path / name)
    job = prepare(RunConfig.model_validate({"model": str(folder), "group_size": 32, "device": "cpu"}), writes=False)
    stream, left_out = job.stream(), []
    seen = stream.embed(calibration_inputs(kind)[:4], 2)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(h.shape, generator=generator, dtype=h.dtype) for h in seen.hidden]

    def differentiated():
        powers: dict[str, torch.Tensor] = {}
        with stream.block(0) as block:
            layers, before = backward.block_backward(block, seen, gradients, 1, powers)
            tokens, same = backward.token_powers(block, seen, gradients)
        assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True))
        rows = [tensor for layer in layers.values() for row in layer.rows for tensor in row]
        return [*before, *powers.values(), *tokens.values(), *rows]

    def noted(*gradients: torch.Tensor) -> bool:
        left_out.append(adds_up(*gradients))
        return left_out[-1]

    adds_up = backward.adds_up
    monkeypatch.setattr(backward, "adds_up", noted)
    shortened = differentiated()
    assert any(left_out) == KINDS[name]
    monkeypatch.setattr(backward, "last_linear", lambda *_: None)
    for ours, whole in zip(shortened, differentiated(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-7)


def test_what_does_not_reach_the_output_has_a_gradient_of_zero() -> None:
    leaf = torch.ones(2, requires_grad=True)
    unread, chosen = leaf * 3, (leaf > 0).float()
    output = leaf * 2 * chosen
    gradients = backward._gradients(output, [leaf, unread, chosen], torch.ones(2))
    assert [g.tolist() for g in gradients] == [[2, 2], [0, 0], [0, 0]]


def test_rounded_inputs_cost_the_gradient_times_their_error(tmp_path: Path) -> None:
    folder = save_kind(kind_named("gemma2"), tmp_path / "model")
    job = prepare(RunConfig.model_validate({"model": str(folder), "group_size": 32, "device": "cpu"}), writes=False)
    stream = job.stream()
    seen = stream.embed(calibration_inputs(kind_named("gemma2"))[:4], 2)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(h.shape, generator=generator, dtype=h.dtype) for h in seen.hidden]
    kinds = [FP8_TOKEN, MXFP4]
    with stream.block(0) as block:
        errors = backward.InputErrors({linear.unit: kinds for linear in block.spec.linears}, {})
        layers, _ = backward.block_backward(block, seen, gradients, 1, {}, errors)
        rows = {name: list(layer.rows) for name, layer in layers.items()}
        weights = {linear.name: block.weight(linear).double() for linear in block.spec.linears}
    for unit in dict.fromkeys(linear.unit for linear in block.spec.linears):
        members = [linear.name for linear in block.spec.linears if linear.unit == unit]
        for kind in kinds:
            found = torch.cat(errors.found[unit][kind])
            for row in range(4):
                x = rows[members[0]][row][0].double()
                j = sum(rows[name][row][1].double() @ weights[name] for name in members)
                dx = fake_quantize(x.float(), kind).double() - x
                torch.testing.assert_close(found[row], (j * dx).sum(-1).square().sum(), rtol=1e-3, atol=0)
