"""GPTAQ, target shift, scale refit and the choices on held-out rows against the slow references."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.gptq import RowGrids, round_compensated
from hawqtool.rounding.gram import quadratic_form
from hawqtool.rounding.grid import Quantized, dequantize, expand_scales, search_grid, search_scales
from hawqtool.rounding.input_drift import best_shift, full_shift, gptaq_problem
from hawqtool.rounding.layer import choose_settings, round_group
from hawqtool.rounding.method import BETAS, LayerSettings, RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics, is_held_out, second_moments
from hawqtool.rounding.two_pass import prepare, refit_scales
from hawqtool.runtime.stage_timer import UNRECORDED
from tests.reference.rounding.test_layer import DAMPING, Case, assert_matches, make_case, reference_of, run, scales_of
from tests.support import oracles

SHAPES = [(24, 96, 32), (16, 256, 64), (20, 100, CHANNEL)]
ROWS, POSITIONS = 16, 40


@dataclass(frozen=True)
class Drifted:
    """A layer whose inputs differ from the original's: ``[tokens, in]`` both, in rows of `POSITIONS` tokens."""

    weight: Tensor
    inputs: Tensor
    original: Tensor

    @property
    def held(self) -> Tensor:
        return is_held_out(torch.arange(ROWS)).repeat_interleave(POSITIONS)

    @property
    def statistics(self) -> GroupStatistics:
        return second_moments(self.inputs, len(self.inputs), self.held, self.original)

    @property
    def factor(self) -> Factor:
        statistics = self.statistics
        return factorize(statistics.gram, statistics.num_tokens, DAMPING)

    def held_out_error(self, value: Tensor) -> float:
        """Mean of (Q x - W x0)² on the held-out tokens."""
        x, x0 = (part[self.held].double() for part in (self.inputs, self.original))
        return float((x @ value.double().t() - x0 @ self.weight.double().t()).square().sum(1).mean())


def drifted(rows: int, columns: int, seed: int = 0, noise: float = 0.1) -> Drifted:
    """What a rounded layer before does to inputs: part of it a mixture of the inputs, part of it noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs = torch.randn(ROWS * POSITIONS, columns, generator=generator) @ mixing * sizes
    change = torch.eye(columns) + noise * torch.randn(columns, columns, generator=generator) / columns**0.5
    original = inputs @ change + noise * torch.randn(inputs.shape, generator=generator)
    return Drifted(torch.randn(rows, columns, generator=generator) * 0.02, inputs, original)


def task(weight: Tensor, bits: int = 3, group_size: int = 32, dtype: torch.dtype = torch.bfloat16) -> Task:
    return Task("layer", weight, QuantFormat(bits, group_size), dtype)


def same(one: list[Quantized], other: list[Quantized]) -> bool:
    return all(
        torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_foem_gives_exactly_the_codes_of_its_authors_code(bits: int, beta: float) -> None:
    case, fmt = make_case(24, 256, seed=5), QuantFormat(bits, 64)
    scales = scales_of(case, fmt)
    reference = reference_of(case, fmt, scales)
    theirs = oracles.foem_in_place(reference.weight, reference.grid, reference.hessian, beta)[0]
    # In float64, where the order of summation decides no tie.
    factor = replace(case.factor, upper=torch.from_numpy(oracles.upper_factor(reference.hessian)))
    weight, step = case.weight.double(), expand_scales(scales, 256).double()
    lowest, highest = (weight.new_full((24,), float(v)) for v in (fmt.min_code, fmt.max_code))
    codes = round_compensated(weight, RowGrids(step, lowest, highest), factor, beta)
    assert np.array_equal(codes.numpy()[:, reference.order], theirs)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_gptaq_equals_the_reference_loop(rows: int, columns: int, group_size: int, bits: int, alpha: float) -> None:
    layer, fmt = drifted(rows, columns), QuantFormat(bits, group_size)
    statistics = layer.statistics
    assert statistics.drift is not None
    case = Case(layer.weight, statistics.gram, statistics.num_tokens)
    scales = scales_of(case, fmt)
    reference = reference_of(case, fmt, scales)
    drift = statistics.drift.double().numpy()[np.ix_(reference.order, reference.order)]
    expected = oracles.gptaq(reference.weight, reference.grid, reference.hessian, drift, alpha)
    target, factor = gptaq_problem(layer.weight, statistics.drift, case.factor, alpha)
    lowest, highest = (layer.weight.new_full((rows,), float(v)) for v in (fmt.min_code, fmt.max_code))
    codes = round_compensated(target, RowGrids(expand_scales(scales, columns), lowest, highest), factor)
    assert_matches(codes, expected, reference)
    plain = oracles.gptq(reference.weight, reference.grid, reference.hessian)[0]
    assert (plain != expected[0]).mean() > 0.005, "the correction must show"


def test_the_shift_equals_the_explicit_inverse() -> None:
    layer = drifted(24, 96)
    statistics, factor = layer.statistics, layer.factor
    assert statistics.drift is not None
    hessian = oracles.damped(statistics.gram.double().numpy(), DAMPING)
    expected = oracles.full_shift(layer.weight.double().numpy(), statistics.drift.double().numpy(), hessian)
    found = full_shift(layer.weight, statistics.drift, factor).double().numpy()
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_the_drift_of_outputs_gives_the_same_shift() -> None:
    layer = drifted(24, 96)
    halves = [
        second_moments(layer.inputs[s], 100, None, layer.original[s], weight=layer.weight)
        for s in (slice(100), slice(100, None))
    ]
    statistics = halves[0]
    statistics += halves[1]
    assert statistics.drift is None and statistics.output_drift is not None
    factor = factorize(statistics.gram, statistics.num_tokens, DAMPING)
    whole = second_moments(layer.inputs, len(layer.inputs), None, layer.original)
    settings = [LayerSettings(shift=0.5)]
    method, tasks = RoundingMethod("gptq", shift=0.5), [task(layer.weight, 3)]
    found, expected = (prepare(tasks, factor, method, s, settings, UNRECORDED).targets[0] for s in (statistics, whole))
    assert float((found - expected).norm()) <= 1e-4 * float((expected - layer.weight).norm())


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_the_best_shift_is_the_best_of_all_shares(noise: float) -> None:
    layer = drifted(24, 96, noise=noise)
    fitting, held_out = layer.statistics.fitting, layer.statistics.held_out
    assert fitting is not None and fitting.drift is not None and held_out is not None
    shift = full_shift(layer.weight, fitting.drift, factorize(fitting.gram, fitting.num_tokens, DAMPING))
    share = best_shift(layer.weight, shift, held_out)
    assert 0 < share <= 1
    errors = [layer.held_out_error(layer.weight + a * shift) for a in np.linspace(0, 1, 21)]
    assert layer.held_out_error(layer.weight + share * shift) <= min(errors) * (1 + 1e-5)
    assert best_shift(layer.weight, -shift, held_out) == 0
    assert best_shift(layer.weight, torch.zeros_like(shift), held_out) == 0


@pytest.mark.parametrize(
    "method",
    [
        RoundingMethod("gptaq", alpha=0.0),
        RoundingMethod("foem", beta=0.0),
        RoundingMethod("gptq", shift=0.0),
    ],
    ids=["alpha", "beta", "shift"],
)
def test_corrections_of_nothing_are_gptq(method: RoundingMethod) -> None:
    layer = drifted(24, 96)
    tasks, statistics = [task(layer.weight), task(layer.weight, 4, CHANNEL)], layer.statistics
    plain = round_group(tasks, layer.factor, RoundingMethod("gptq"))
    assert same(round_group(tasks, layer.factor, method, statistics), plain)
    # Nor is there anything to correct where the inputs are the original's.
    exact = replace(statistics, drift=None)
    for corrected in (RoundingMethod("gptaq"), RoundingMethod("gptq", shift=0.5), RoundingMethod("gptq", shift="auto")):
        assert same(round_group(tasks, layer.factor, corrected, exact), plain)
        assert not same(round_group(tasks, layer.factor, corrected, statistics), plain)


@pytest.mark.parametrize("method", [RoundingMethod("gptaq", alpha=1.0), RoundingMethod("gptq", shift="auto")])
@pytest.mark.parametrize("bits", [3, 4])
def test_corrections_bring_outputs_closer_to_the_original(method: RoundingMethod, bits: int) -> None:
    layer = drifted(24, 96, noise=0.3)
    tasks, statistics = [task(layer.weight, bits)], layer.statistics
    plain, corrected = (
        layer.held_out_error(dequantize(*round_group(tasks, layer.factor, m, statistics)[0]))
        for m in (RoundingMethod("gptq"), method)
    )
    assert corrected < 0.95 * plain


@pytest.mark.parametrize("seed", range(3))
def test_auto_takes_the_beta_of_least_held_out_error(seed: int) -> None:
    layer = drifted(24, 96, seed)
    statistics = layer.statistics
    fitting = statistics.fitting
    assert fitting is not None
    tasks = [task(layer.weight), task(layer.weight, 2)]
    chosen = choose_settings(tasks, layer.factor, RoundingMethod("foem", beta="auto"), statistics)
    part = factorize(fitting.gram, fitting.num_tokens, DAMPING)
    for index, settings in enumerate(chosen):
        errors = {
            beta: layer.held_out_error(dequantize(*round_group(tasks, part, RoundingMethod("foem", beta))[index]))
            for beta in BETAS
        }
        assert errors[settings.beta] == pytest.approx(min(errors.values()), rel=1e-5)
        final = round_group(tasks, layer.factor, RoundingMethod("foem", beta="auto"), statistics)[index]
        assert same([final], [round_group(tasks, layer.factor, RoundingMethod("foem", settings.beta))[index]])


@pytest.mark.parametrize("seed", range(3))
def test_auto_takes_the_shift_of_least_held_out_error(seed: int) -> None:
    """Of a shift that was fitted to the other rows, which would take all of it: most of this drift is noise."""
    layer, generator = drifted(24, 96, seed), torch.Generator().manual_seed(seed)
    layer = replace(layer, original=layer.original + torch.randn(layer.inputs.shape, generator=generator))
    statistics, fitting = layer.statistics, layer.statistics.fitting
    assert fitting is not None and fitting.drift is not None
    method = RoundingMethod("gptq", shift="auto")
    (chosen,) = choose_settings([task(layer.weight)], layer.factor, method, statistics)
    full = full_shift(layer.weight, fitting.drift, factorize(fitting.gram, fitting.num_tokens, DAMPING))
    none, half, whole = (layer.held_out_error(layer.weight + share * full) for share in (0.0, 0.5, 1.0))
    # The vertex of the parabola through the three.
    assert chosen.shift == pytest.approx((3 * none - 4 * half + whole) / (4 * (none - 2 * half + whole)), rel=1e-3)
    assert chosen.shift < 0.5 < best_shift(layer.weight, full, fitting)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_refit_equals_the_reference(rows: int, columns: int, group_size: int, bits: int, symmetric: bool) -> None:
    case, fmt = make_case(rows, columns), QuantFormat(bits, group_size, symmetric)
    grid = search_grid(case.weight, torch.ones(columns), fmt, torch.float32, both_signs=True)
    step, zero = (None if part is None else expand_scales(part, columns) for part in grid)
    assert step is not None
    lowest, highest = (case.weight.new_full((rows,), float(v)) for v in (fmt.min_code, fmt.max_code))
    codes = round_compensated(case.weight, RowGrids(step, lowest, highest, zero), case.factor)
    rounded = Quantized(codes, *grid)
    gram = torch.from_numpy(oracles.damped(case.gram.double().numpy(), DAMPING)).float()
    found = refit_scales(rounded, case.weight, gram)
    assert torch.equal(found.codes, codes) and found.scales.dtype == torch.float32
    levels = codes.double().numpy() - (0 if zero is None else zero.double().numpy())
    scales = rounded.scales.double().numpy().copy()
    target, hessian = case.weight.double().numpy(), gram.double().numpy()
    for group in range(scales.shape[1]):
        for row in range(rows):
            new = oracles.refitted_scale(levels, scales, target, hessian, row, group, torch.float32)
            scales[row, group] = new if new * scales[row, group] > 0 else scales[row, group]
    np.testing.assert_allclose(found.scales.double().numpy(), scales, rtol=1e-3)
    before, after = (oracles.objective(dequantize(*q).double().numpy() - target, hessian) for q in (rounded, found))
    assert after < 0.999 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_refit_never_raises_the_error_of_any_row(bits: int, dtype: torch.dtype) -> None:
    case, fmt = make_case(24, 256), QuantFormat(bits, 64)
    scales = search_scales(case.weight, case.factor.diagonal, fmt, dtype, both_signs=True)
    rounded = Quantized(run(case, fmt, scales, 0.0), scales, None)
    found = refit_scales(rounded, case.weight, case.gram)
    errors = [((d @ case.gram) * d).sum(1) for d in (dequantize(*q).float() - case.weight for q in (rounded, found))]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert bool((found.scales.sign() == scales.sign()).all())


def test_a_group_of_zeros_keeps_its_scale() -> None:
    case, fmt = make_case(16, 96), QuantFormat(4, 32)
    scales = scales_of(case, fmt)
    codes = run(case, fmt, scales, 0.0)
    codes[3, 32:64] = 0
    found = refit_scales(Quantized(codes, scales, None), case.weight, case.gram)
    assert found.scales[3, 1] == scales[3, 1] and bool(torch.isfinite(found.scales).all())


@pytest.mark.parametrize("seed", range(4))
def test_refit_is_taken_only_where_the_held_out_error_falls(seed: int) -> None:
    layer = drifted(24, 96, seed)
    statistics = replace(layer.statistics, drift=None)
    fitting, held_out = statistics.fitting, layer.statistics.held_out
    assert fitting is not None and held_out is not None
    method = RoundingMethod("gptq", refit=True)
    tasks = [task(layer.weight, bits) for bits in (2, 3, 8)]
    part = factorize(fitting.gram, fitting.num_tokens, DAMPING)
    damped = torch.from_numpy(oracles.damped(fitting.gram.double().numpy(), DAMPING)).float()
    statistics.held_out = replace(held_out, drift=None)
    plain = round_group(tasks, part, RoundingMethod("gptq"))
    final = round_group(tasks, layer.factor, RoundingMethod("gptq"))
    found = round_group(tasks, layer.factor, method, statistics)
    for index, settings in enumerate(choose_settings(tasks, layer.factor, method, statistics)):
        refitted = refit_scales(plain[index], layer.weight, damped)
        before, after = (
            float(quadratic_form(dequantize(*q).float() - layer.weight, held_out.gram))
            for q in (plain[index], refitted)
        )
        assert settings.refit == (after < before)
        assert same([found[index]], [final[index]]) == (not settings.refit)


def test_the_parts_of_statistics_are_those_of_their_tokens() -> None:
    layer = drifted(4, 96)
    statistics, held = layer.statistics, layer.held
    for part, mask in ((statistics.fitting, ~held), (statistics.held_out, held), (statistics, torch.ones_like(held))):
        assert part is not None and part.drift is not None
        x, x0 = layer.inputs[mask].double(), layer.original[mask].double()
        assert part.num_tokens == len(x)
        torch.testing.assert_close(part.gram.double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.drift.double(), (x0 - x).t() @ x / len(x), rtol=1e-4, atol=1e-4)
    half = len(layer.inputs) // 2
    first, second = (
        second_moments(layer.inputs[s], half, held[s], layer.original[s]) for s in (slice(0, half), slice(half, None))
    )
    first += second
    assert first.held_out is not None and statistics.held_out is not None
    for one, other in ((first, statistics), (first.held_out, statistics.held_out)):
        assert one.drift is not None and other.drift is not None and one.num_tokens == other.num_tokens
        torch.testing.assert_close(one.gram, other.gram)
        torch.testing.assert_close(one.drift, other.drift, rtol=1e-4, atol=1e-5)


def test_without_held_out_tokens_nothing_is_chosen() -> None:
    layer = drifted(24, 96)
    statistics = second_moments(layer.inputs, len(layer.inputs), None, layer.original)
    assert statistics.fitting is None
    method = RoundingMethod("foem", beta="auto", shift="auto", refit=True)
    plain = round_group([task(layer.weight)], layer.factor, RoundingMethod("gptq"))
    assert same(round_group([task(layer.weight)], layer.factor, method, statistics), plain)
    with pytest.raises(ValueError, match="no statistics"):
        round_group([task(layer.weight)], layer.factor, method)
