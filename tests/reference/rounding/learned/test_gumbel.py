"""Annealed codes: gradients against autograd in float64, sign steps, noise by counter, limits of the grid."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.rounding.grid import Quantized, dequantize, nearest_codes, search_grid
from hawqtool.rounding.learned.gumbel import (
    BETAS,
    LEVEL_GAP,
    SHARPNESS,
    TEMPERATURE,
    GumbelLayers,
    SignMomentum,
    gumbel_noise,
    noise_key,
    uniform,
)
from hawqtool.rounding.spec import InitialRounding

STEPS = 20


def start(name: str, shape: tuple[int, int], fmt: QuantFormat, seed: int) -> InitialRounding:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scales, zeros = search_grid(weight, torch.ones(shape[1]), fmt, torch.bfloat16, both_signs=True)
    return InitialRounding(name, weight, Quantized(nearest_codes(weight, scales, fmt, zeros), scales, zeros), fmt)


LAYERS = [
    start("up", (6, 64), QuantFormat(2, 32), 1),
    start("down", (5, 32), QuantFormat(3, 32, symmetric=False), 2),
]


def slow_soft(layers: GumbelLayers, logits: Tensor, log_change: Tensor) -> Tensor:
    """Soft weights by the formula, in float64: ``[groups, width]``."""
    share = layers.taken / (STEPS - 1)
    temperature = TEMPERATURE[0] + share * (TEMPERATURE[1] - TEMPERATURE[0])
    sharpness = SHARPNESS[0] + share * (SHARPNESS[1] - SHARPNESS[0])
    noise = gumbel_noise(logits.numel(), noise_key(7, "up"), layers.taken, logits.device).double().view_as(logits)
    chance = torch.softmax((sharpness * logits + noise) / temperature, 0)
    starts = torch.cat([s.rounded.codes.double().view(-1, 32) for s in LAYERS])
    zero = torch.cat([torch.zeros(12, 1), LAYERS[1].rounded.zeros.float()]).double()  # type: ignore[union-attr]
    levels = torch.stack([starts + distance - zero for distance in range(-2, 3)])
    scale = torch.cat([s.rounded.scales.double().view(-1, 1) for s in LAYERS]) * log_change.exp()
    return (chance * levels).sum(0) * scale


@pytest.mark.parametrize("taken", [0, 9, STEPS - 1])
def test_soft_weights_and_gradients_are_those_of_autograd_in_float64(taken: int) -> None:
    layers = GumbelLayers(LAYERS, STEPS, seed=7)
    layers.taken = taken
    layers.log_change += 0.1
    layers.logits[layers.logits > -1] *= 100 * (TEMPERATURE[1] if taken else 1) / SHARPNESS[1]  # no choice is sure
    probe = torch.randn(layers.codes.shape, generator=torch.Generator().manual_seed(3))

    logits, log_change = layers.logits.double().requires_grad_(), layers.log_change.double().requires_grad_()
    expected = slow_soft(layers, logits, log_change)
    (expected * probe.double()).sum().backward()
    found = layers.soft()
    layers.collect_from(probe)

    torch.testing.assert_close(
        found.double(), expected.detach(), rtol=0, atol=1e-4 * float(expected.detach().abs().max())
    )
    for value, exact in ((layers.logits.grad, logits.grad), (layers.log_change.grad, log_change.grad)):
        assert value is not None and exact is not None
        # float32 logits times κ/τ, at most 10^4, in the exponent: 1e-3 of the largest.
        largest = float(exact.abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-3 * largest)


def test_the_start_is_the_start_and_no_code_leaves_the_grid() -> None:
    layers = GumbelLayers(LAYERS, STEPS, seed=7)
    for layer in LAYERS:
        torch.testing.assert_close(layers.rounded()[layer.name], layer.rounded, rtol=0, atol=0)
        hard = layers.weights(torch.float32, differentiable=False)[layer.name]
        torch.testing.assert_close(hard, dequantize(*layer.rounded).float(), rtol=0, atol=0)
    layers.soft()
    layers.collect_from(torch.ones_like(layers.leaf).expand_as(layers.codes))
    absent = layers.logits < -1
    assert layers.logits.grad is not None and not bool(layers.logits.grad[absent].any()) and bool(absent.any())
    layers.logits -= LEVEL_GAP * 5 * torch.arange(5).view(-1, 1, 1)  # the lowest that there is
    moved = layers.rounded()
    for layer in LAYERS:
        expected = (layer.rounded.codes - 2).clamp_min(layer.quant_format.min_code)
        assert torch.equal(moved[layer.name].codes, expected), layer.name


def test_a_step_is_lion_s() -> None:
    value, mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    learned = value.float()
    optimizer = SignMomentum([{"params": [learned], "lr": 0.25}])
    for gradient in ([1.0, -1.0, 0.0], [-0.5, -3.0, 0.0], [-20.0, 1.0, 2.0]):
        learned.grad = torch.tensor(gradient)
        optimizer.step()
        exact = torch.tensor(gradient, dtype=torch.float64)
        value = value - 0.25 * torch.sign(BETAS[0] * mean + (1 - BETAS[0]) * exact)
        mean = BETAS[1] * mean + (1 - BETAS[1]) * exact
    assert learned.tolist() == value.tolist()


def test_noise_is_a_function_of_key_step_and_place() -> None:
    count = 1 << 16
    noise = gumbel_noise(count, 5, 3, torch.device("cpu"))
    assert torch.equal(noise[:100], gumbel_noise(100, 5, 3, torch.device("cpu")))
    values = noise.double()
    error = 5 / math.sqrt(count)
    assert abs(float(values.mean()) - 0.5772) < 1.3 * error  # Euler's constant; standard deviation π/√6
    assert abs(float(values.var()) / (math.pi**2 / 6) - 1) < 3 * error
    for other in (gumbel_noise(count, 6, 3, noise.device), gumbel_noise(count, 5, 4, noise.device), noise.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < error


def test_no_noise_is_infinite() -> None:
    """A uniform number of 1 would be, once in 2^24 draws."""
    lowest, highest = uniform(torch.tensor([0, 0xFFFFFFFF])).tolist()
    assert 0 < lowest < 1e-7 and 1 - 1e-7 < highest < 1


def test_many_groups_share_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawqtool.rounding.learned.gumbel._NOISE", 5 * 32 * 7)  # 7 of 17 groups are told apart
    layers = GumbelLayers([replace(s, name="any") for s in LAYERS], STEPS, seed=7)
    layers.logits.zero_()
    layers.soft()
    chance = layers._probabilities
    assert torch.equal(chance[:, :7], chance[:, 7:14]) and torch.equal(chance[:, :3], chance[:, 14:])
    assert not torch.equal(chance[:, :3], chance[:, 3:6])
