"""Bounds on rounding: nearest rounding keeps them by their derivation, and what is no rounding does not."""

from __future__ import annotations

import pytest
import torch

from hawqtool.export.plausibility import (
    GAIN_LIMIT,
    error_bound_problems,
    gain_problems,
    half_step_bounds,
    multiple_problems,
    scale_multiples,
)
from hawqtool.formats import QuantFormat
from hawqtool.rounding.grid import dequantize
from tests.support.packed_folder import round_nearest

ROWS, COLUMNS = 8, 128


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_nearest_rounding_keeps_the_bound_of_its_grid(bits: int, symmetric: bool, scale: float) -> None:
    """On the grid that spans the range: whatever the weights, no scale's error is above n s² / 4."""
    quant_format = QuantFormat(bits, 32, symmetric)
    for seed in range(5):
        weight = scale * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)).pow(3)
        grouped = weight.view(ROWS, -1, 32).double()
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        if symmetric:
            high = grouped.abs().amax(-1)
            low = -high
        step = ((high - low) / (2**bits - 1)).unsqueeze(-1)
        centred = (grouped - low.unsqueeze(-1)) / step  # levels 0 to 2^b - 1, whose ends are the range's
        error = (centred.round().clamp(0, 2**bits - 1) - centred).mul(step).square().sum(-1)
        assert (error <= half_step_bounds(weight, quant_format) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 0])
def test_plain_rounding_is_no_problem_and_other_weights_are(bits: int, group_size: int) -> None:
    quant_format = QuantFormat(bits, group_size)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(bits))
    layer = round_nearest("m", weight, quant_format)
    groups = quant_format.num_groups(COLUMNS)
    restored = (layer.codes.view(ROWS, groups, -1) * layer.scales.unsqueeze(-1)).view_as(weight)
    for other, bad in ((weight, False), (weight.flip(0), True), (-weight, True)):
        error = (restored - other).square().view(ROWS, groups, -1).sum(-1)
        energy = other.square().view(ROWS, groups, -1).sum(-1)
        found = error_bound_problems("m", error, energy, half_step_bounds(other, quant_format))
        assert bool(found) == bad and len(found) <= 1
        assert not found or found[0].startswith("m: the module has relative squared weight error")


def test_nan_is_a_problem() -> None:
    one = torch.ones(2, 2)
    assert error_bound_problems("m", one * float("nan"), one, one)


def test_weights_that_are_zero_are_no_problem() -> None:
    zero = torch.zeros(2, 2)
    assert error_bound_problems("m", zero, zero, zero) == []


def test_feedback_into_a_quiet_group_is_no_problem() -> None:
    # Compensated rounding at 2 bits: errors of loud groups move into one that was nearly zero.
    energy = torch.tensor([[32.0, 0.32]]).repeat(4, 1)
    bound = 0.5 * energy
    assert error_bound_problems("m", torch.tensor([[3.0, 4.0]]).repeat(4, 1), energy, bound) == []
    assert error_bound_problems("m", torch.tensor([[40.0, 40.0]]).repeat(4, 1), energy, bound)


def test_output_feedback_into_other_rows_is_no_problem() -> None:
    # As seen at 3 bits: rows of 19 and of 0.7 times the mean energy, the latter with 1.7 times its energy of error.
    energy = torch.tensor([[19.0], [0.7], [0.15], [0.15]]).repeat(1, 2) / 2
    bound, error = 0.12 * energy, torch.tensor([[1.5], [1.2], [0.1], [0.3]]).repeat(1, 2) / 2
    assert error_bound_problems("m", error, energy, bound) == []
    error[1] *= 40
    assert error_bound_problems("m", error, energy, bound)


def test_a_row_at_2_bits_may_err_by_steps_that_are_as_wide_as_its_weights() -> None:
    # As seen after distillation: 4.7 times a mean row's energy.
    energy = torch.ones(64, 2)
    error = 0.4 * energy
    error[1] = 4.7
    assert error_bound_problems("m", error, energy, 0.75 * energy) == []
    error[1] *= 3
    assert error_bound_problems("m", error, energy, 0.75 * energy)


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_a_row_of_zeros_is_a_problem_if_it_is_not_far_below_the_mean(bits: int) -> None:
    # What feedback may do to a row follows the step of the grids: at more bits quieter rows are told from it.
    weight = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(bits))
    weight[7] *= {4: 1.0, 5: 0.6, 8: 0.5}[bits]
    energy = weight.square().view(64, -1, 32).sum(-1)
    error = torch.zeros_like(energy)
    error[7] = energy[7]
    found = error_bound_problems("m", error, energy, half_step_bounds(weight, QuantFormat(bits, 32)))
    assert found and found[0].startswith("m: row 7 ")


def test_a_step_wider_than_a_row_is_no_problem_and_more_than_its_bound_is() -> None:
    # As seen in whole rows at 3 bits: one weight that is half of a row's energy, and errors of 16 times that energy.
    weight = torch.full((4, 3072), 0.05)
    weight[1, 0] = 7.0
    energy, bound = weight.square().sum(1, keepdim=True), half_step_bounds(weight, QuantFormat(3, 0))
    error = 0.05 * energy
    error[1] = 16 * energy[1]
    assert error_bound_problems("m", error, energy, bound) == []
    error[1] *= 50
    assert error_bound_problems("m", error, energy, bound)
    error[1] = 5 * energy[1]
    assert error_bound_problems("m", error, energy, 0.5 * energy.mean().expand(4, 1))


def test_gains() -> None:
    gain = torch.tensor([1.0, 0.5, -1.0, 0.0])
    assert gain_problems("n", gain * 1.2, gain) == []
    assert gain_problems("n", gain + GAIN_LIMIT / 2, gain) == []
    assert "differs by 1 of" in gain_problems("n", torch.zeros(4), gain)[0]
    assert gain_problems("n", torch.full((4,), float("nan")), gain)
    assert gain_problems("n", torch.zeros(0), torch.zeros(0)) == []


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_is_not_that_of_its_codes_is_a_problem(bits: int, symmetric: bool) -> None:
    # In rows of many groups, where one group's error is nothing beside the row's weights.
    weight = torch.randn(ROWS, 1024, generator=torch.Generator().manual_seed(bits))
    layer = round_nearest("m", weight, QuantFormat(bits, 32, symmetric))
    for factor, bad in ((1.0, False), (1.1, False), (2.0, True), (-2.0, False)):
        scales = layer.scales.float().clone()
        scales[5, 3] *= factor
        restored = dequantize(layer.codes, scales, layer.zeros)
        error, energy = (v.square().view(ROWS, -1, 32).sum(-1) for v in (restored - weight, weight))
        multiple = scale_multiples(weight, restored, error, energy, bits)
        found = multiple_problems("m", multiple)
        assert bool(found) == bad
        assert not bad or found[0].startswith("m: row 5, group 3 is ")
        w, q = weight[5, 96:128].double(), restored[5, 96:128].double()
        others = w.abs() < w.abs().sort().values[-4]
        expected = min(float((w[kept] @ q[kept]) / w[kept].square().sum()) for kept in (w.abs() >= 0, others))
        assert not bad or float(multiple[5, 3]) == pytest.approx(expected, rel=1e-5)


def test_few_weights_that_are_most_of_their_group_are_no_multiple() -> None:
    # Feedback makes more of the largest; clipping less, while the next is rounded up.
    for first, second in ((1.9, 0.1), (0.2, 0.18)):
        weight = 0.001 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        weight[2, 40], weight[2, 50] = 1.0, 0.1
        restored = weight.clone()
        restored[2, 40], restored[2, 50] = first, second
        error, energy = (v.square().view(4, -1, 32).sum(-1) for v in (restored - weight, weight))
        assert multiple_problems("m", scale_multiples(weight, restored, error, energy, 4)) == []


def test_errors_as_large_as_the_weights_are_no_multiple() -> None:
    # Feedback of other columns and rows has no reason to lie along a group's weights, at any size.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 64, generator=generator)
    for size in (0.3, 1.0, 3.0):
        restored = weight + size * torch.randn(2000, 64, generator=generator)
        error, energy = (v.square().view(2000, -1, 32).sum(-1) for v in (restored - weight, weight))
        assert multiple_problems("m", scale_multiples(weight, restored, error, energy, 4)) == []
