"""Fake quantization and its gradients against slow float64 arithmetic, and what refinement promises of a block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import QuantFormat
from hawqtool.rounding.grid import Quantized, dequantize, nearest_codes, search_grid
from hawqtool.rounding.learned.block import (
    Batches,
    Learner,
    OutputMetric,
    Refined,
    Schedule,
    damped_metric,
    output_error,
    refine,
)
from hawqtool.rounding.learned.fake_quant import (
    FlatLayers,
    InitialRounding,
    by_kind,
    fake_quantize,
    parameter_gradients,
)

WIDTH, INNER, ROWS, POSITIONS = 64, 96, 4, 16


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def start(name: str, rows: int, columns: int, fmt: QuantFormat, dtype: torch.dtype, seed: int) -> InitialRounding:
    weight = random(rows, columns, seed=seed, dtype=dtype) / columns**0.5
    scales, zeros = search_grid(weight.float(), torch.ones(columns), fmt, dtype, both_signs=True)
    codes = nearest_codes(weight.float(), scales, fmt, zeros)
    # Some codes are not the nearest, as after compensation.
    moved = torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2
    codes = torch.where(moved, (codes + 1).clamp(fmt.min_code, fmt.max_code), codes)
    return InitialRounding(name, weight, Quantized(codes, scales, zeros), fmt)


STARTS = [
    start("up", INNER, WIDTH, QuantFormat(3, 32), torch.bfloat16, 1),
    start("down", WIDTH, INNER, QuantFormat(4, 32, symmetric=False), torch.bfloat16, 2),
    start("out", WIDTH, WIDTH, QuantFormat(2, 64), torch.bfloat16, 3),
]
GAIN = 1 + 0.1 * random(WIDTH, seed=4, dtype=torch.bfloat16)


def forward(weights: Mapping[str, Tensor], x: Tensor, _batch: int) -> Tensor:
    normed = x / x.square().mean(-1, keepdim=True).sqrt() * weights["norm"]
    hidden = torch.tanh(normed @ weights["up"].t()) @ weights["down"].t()
    return x + hidden @ weights["out"].t()


def batches(count: int, seed: int) -> Batches:
    inputs = [random(ROWS, POSITIONS, WIDTH, seed=seed + n, dtype=torch.float32) for n in range(count)]
    original = {s.name: s.weight.float() for s in STARTS} | {"norm": GAIN.float()}
    return Batches(inputs, [forward(original, x, 0) for x in inputs])


def run(schedule: Schedule) -> Refined:
    gains = {"norm": (GAIN.float(), torch.bfloat16)}
    return refine(STARTS, gains, forward, batches(6, 100), batches(2, 200), schedule)


def heldout_error(layers: Mapping[str, Quantized], gain: Tensor) -> float:
    """What `Refined.log.after` says, from the results alone, in float64."""
    weights = {name: dequantize(*found).double() for name, found in layers.items()} | {"norm": gain.double()}
    held = batches(2, 200)
    shares = []
    for x, y in zip(held.inputs, held.targets, strict=True):
        goal = y.double()
        error = forward(weights, x.double(), 0) - goal
        shares += (error.square().sum(-1) / goal.square().sum(-1)).flatten().tolist()
    return math.fsum(shares) / len(shares)


def slow_weights(latent: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`fake_quantize` weight by weight."""
    result = torch.zeros_like(latent)
    for group in range(latent.shape[0]):
        for column in range(latent.shape[1]):
            code = min(max(round(float(latent[group, column])), float(low[group])), float(high[group]))
            result[group, column] = (code - float(zero[group])) * float(scale[group])
    return result


def test_fake_weights_are_those_of_the_file() -> None:
    for flat in [FlatLayers(some, reach=1) for some in by_kind(STARTS)]:
        found, kept = flat.weights(torch.bfloat16, False), flat.rounded()
        for s in flat.initial:
            assert torch.equal(found[s.name], dequantize(*s.rounded))
            assert torch.equal(kept[s.name].codes, s.rounded.codes)
            assert torch.equal(kept[s.name].scales, s.rounded.scales)
    assert {flat.width for flat in [FlatLayers(some, reach=1) for some in by_kind(STARTS)]} == {32, 64}


def test_fake_quantization_and_its_gradients_against_a_slow_reference() -> None:
    groups, width, step = 6, 5, 1e-6
    latent, grad_at = 3 * random(groups, width, seed=5), random(groups, width, seed=6)
    scale = (0.5 + random(groups, 1, seed=7).abs()) * random(groups, 1, seed=8).sign()
    zero = random(groups, 1, seed=9).round()
    low, high = torch.full((groups, 1), -4.0).double(), torch.full((groups, 1), 3.0).double()
    weight, levels = fake_quantize(latent, scale, zero, low, high, torch.float64)
    assert torch.equal(weight, slow_weights(latent, scale, zero, low, high))
    assert ((latent.round() < low) | (latent.round() > high)).any()

    def loss(value: Tensor) -> float:
        return float((torch.sin(value) * grad_at).sum())

    along, log_scale = parameter_gradients(torch.cos(weight) * grad_at, levels, scale)
    for group in range(groups):
        one = torch.zeros_like(scale)
        one[group] = step
        sides = [loss(slow_weights(latent, scale * (s * one).exp(), zero, low, high)) for s in (1, -1)]
        assert float(log_scale[group]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-8)
        for column in range(width):
            # Straight through: as if the code itself moved.
            moved = torch.zeros_like(weight)
            moved[group, column] = step * float(scale[group])
            slope = (loss(weight + moved) - loss(weight - moved)) / (2 * step)
            assert float(along[group, column]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_gradients_that_reach_the_parameters_are_those_of_the_loss() -> None:
    """From the block's loss to the logarithm of a scale, against differences in float64."""
    given = batches(1, 300)
    x, y = given.inputs[0], given.targets[0]
    flats = [FlatLayers([InitialRounding(s.name, s.weight, _wide(s.rounded), s.quant_format)], 1) for s in STARTS]

    def loss(differentiable: bool) -> Tensor:
        weights = {"norm": GAIN.double()}
        for flat in flats:
            weights |= flat.weights(torch.float64, differentiable)
        return output_error(forward(weights, x.double(), 0), y)

    loss(True).backward()
    for flat in flats:
        flat.collect()
    step = 1e-2
    for flat in flats:
        largest = int(flat.log_change.grad.abs().argmax())  # type: ignore[union-attr]
        sides = []
        for sign in (1, -1):
            flat.log_change[largest] = sign * step
            sides.append(float(loss(False)))
            flat.log_change[largest] = 0
        slope = (sides[0] - sides[1]) / (2 * step)
        assert float(flat.log_change.grad[largest]) == pytest.approx(slope, rel=0.02)  # type: ignore[index]


def _wide(rounded: Quantized) -> Quantized:
    """The same with float32 scales, which do not jump when they change a little."""
    return rounded._replace(scales=rounded.scales.float())


@pytest.mark.parametrize(("schedule", "reach"), [(Schedule(40), 1), (Schedule(40, learner="gumbel"), 2)])
def test_the_kept_result_is_never_worse_and_is_what_was_measured(schedule: Schedule, reach: int) -> None:
    first = heldout_error({s.name: s.rounded for s in STARTS}, GAIN)
    found = run(schedule)
    assert found.log.before == pytest.approx(first, rel=1e-4)
    assert found.log.after == pytest.approx(heldout_error(found.layers, found.gains["norm"]), rel=1e-4)
    assert found.log.after < 0.8 * found.log.before
    for s in STARTS:
        layer = found.layers[s.name]
        assert (layer.codes != s.rounded.codes).any()
        assert int(layer.codes.min()) >= s.quant_format.min_code and int(layer.codes.max()) <= s.quant_format.max_code
        assert int((layer.codes.int() - s.rounded.codes.int()).abs().max()) <= reach
        assert layer.zeros is s.rounded.zeros
        assert torch.equal(layer.scales.sign(), s.rounded.scales.sign())


@pytest.mark.parametrize("schedule", [Schedule(0), Schedule(10, latent_rate=30, scale_rate=3, gain_rate=50)])
def test_the_start_is_kept_exactly_where_nothing_is_better(schedule: Schedule) -> None:
    found = run(schedule)
    assert (found.log.best_step, found.log.after) == (0, found.log.before)
    for s in STARTS:
        assert torch.equal(found.layers[s.name].codes, s.rounded.codes)
        assert torch.equal(found.layers[s.name].scales, s.rounded.scales)
    assert torch.equal(found.gains["norm"], GAIN)


@pytest.mark.parametrize("learner", ["adam", "gumbel"])
def test_a_seed_gives_one_result_and_another_seed_another(learner: Learner) -> None:
    first, again, other = (run(Schedule(12, seed=seed, learner=learner)) for seed in (0, 0, 1))
    assert first.log.after == again.log.after != other.log.after
    for name, layer in first.layers.items():
        assert torch.equal(layer.codes, again.layers[name].codes)
        assert torch.equal(layer.scales, again.layers[name].scales)


def test_a_start_that_is_not_finite_is_an_error_that_names_it() -> None:
    broken = InitialRounding(
        "up",
        STARTS[0].weight,
        STARTS[0].rounded._replace(scales=STARTS[0].rounded.scales * 1e38),
        STARTS[0].quant_format,
    )
    with pytest.raises(NumericalError, match="up"):
        refine(
            [broken, *STARTS[1:]],
            {"norm": (GAIN.float(), torch.bfloat16)},
            lambda w, x, b: forward(w, x, b) * w["up"].sum(),
            batches(2, 1),
            batches(1, 2),
            Schedule(2),
        )


def test_a_cap_takes_the_worst_tokens_out_of_the_steps() -> None:
    target = random(1, 5, 8, seed=3)
    output = (target + 0.1 * random(1, 5, 8, seed=4)).requires_grad_()
    with torch.no_grad():
        output[0, 2] += 100
    relative = ((output - target).square().sum(-1) / target.square().sum(-1)).detach()[0]
    expected = torch.minimum(relative, 20 * relative.median())
    found = output_error(output, target, cap=20)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert output.grad is not None and not output.grad[0, 2].any() and bool(output.grad[0, [0, 1, 3, 4]].any(-1).all())


def weighted(given: Batches, across: Tensor, seed: int) -> Batches:
    importance = [random(ROWS, POSITIONS, seed=seed + n, dtype=torch.float32).abs() for n in range(len(given.inputs))]
    return replace(given, metric=OutputMetric(across, importance))


def slow_weighted_error(layers: Mapping[str, Quantized], gain: Tensor, given: Batches) -> float:
    """Mean over tokens of a êᵀ M ê, token by token in float64."""
    weights = {name: dequantize(*found).double() for name, found in layers.items()} | {"norm": gain.double()}
    assert given.metric is not None
    metric, parts = given.metric.across.double(), []
    for x, y, importance in zip(given.inputs, given.targets, given.metric.importance, strict=True):
        output = forward(weights, x.double(), 0)
        for row in range(ROWS):
            for token in range(POSITIONS):
                goal = y[row, token].double()
                relative = (output[row, token] - goal) / goal.norm()
                parts.append(float(importance[row, token].double() * (relative @ metric @ relative)))
    return math.fsum(parts) / len(parts)


def test_errors_that_cost_the_loss_more_count_more() -> None:
    """What is kept lowers the weighted error of held-out rows, and more so than learning without weights does."""
    directions = random(3, WIDTH, seed=41, dtype=torch.float32)
    across = damped_metric(directions.t() @ directions, 0.05)
    assert float(across.trace()) == pytest.approx(WIDTH, rel=1e-5)
    assert torch.equal(damped_metric(torch.zeros(4, 4), 0.3), torch.eye(4))
    fitting, held_out = weighted(batches(6, 100), across, 500), weighted(batches(2, 200), across, 600)
    gains, schedule = {"norm": (GAIN.float(), torch.bfloat16)}, Schedule(60)
    found = refine(STARTS, gains, forward, fitting, held_out, schedule)
    plain = refine(STARTS, gains, forward, batches(6, 100), batches(2, 200), schedule)
    error, plain_error = (slow_weighted_error(r.layers, r.gains["norm"], held_out) for r in (found, plain))
    assert found.log.after == pytest.approx(error, rel=1e-4)
    assert error < 0.9 * plain_error and error < 0.7 * found.log.before
