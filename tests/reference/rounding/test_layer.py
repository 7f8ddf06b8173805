"""Scales, factor and column loop against the slow references."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.rounding.factor import Factor, default_damping, factorize, inverse_cholesky
from hawqtool.rounding.gptq import RowGrids, round_compensated, row_losses, targets_at_turn
from hawqtool.rounding.gram import quadratic_form
from hawqtool.rounding.grid import (
    COARSE_STEPS,
    FINE_STEPS,
    dequantize,
    expand_scales,
    nearest_codes,
    search_scales,
)
from hawqtool.rounding.kernels.dispatch import EAGER, VARIABLE
from hawqtool.rounding.layer import round_group, round_layers
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics

# The references lie beside the tests, which are no package.
from tests.support import oracles

SHAPES = [(24, 96, 32), (16, 256, 64), (12, 320, 64), (20, 100, CHANNEL)]
DAMPING = 0.05
TIE = 1e-4


@dataclass(frozen=True)
class Case:
    """A layer with correlated, unevenly large inputs."""

    weight: Tensor
    gram: Tensor
    num_tokens: int

    @property
    def statistics(self) -> GroupStatistics:
        return GroupStatistics(self.gram, self.num_tokens, self.num_tokens)

    @functools.cached_property
    def factor(self) -> Factor:
        return factorize(self.gram, self.num_tokens, DAMPING)


@functools.lru_cache(maxsize=32)
def make_case(rows: int, columns: int, seed: int = 0, tokens: int = 2000) -> Case:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing * sizes
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return Case(weight, inputs.T @ inputs / tokens, tokens)


def run(
    case: Case,
    fmt: QuantFormat,
    scales: Tensor,
    beta: float,
    block_size: int = 128,
    zeros: Tensor | None = None,
    column_errors: Tensor | None = None,
    paper_form: bool = False,
) -> Tensor:
    lowest = case.weight.new_full((len(case.weight),), float(fmt.min_code))
    highest = case.weight.new_full((len(case.weight),), float(fmt.max_code))
    step = expand_scales(scales, case.weight.shape[1])
    zero = None if zeros is None else expand_scales(zeros, case.weight.shape[1])
    grids = RowGrids(step, lowest, highest, zero)
    return round_compensated(case.weight, grids, case.factor, beta, block_size, column_errors, paper_form)


def scales_of(case: Case, fmt: QuantFormat) -> Tensor:
    return search_scales(case.weight, case.factor.diagonal, fmt, torch.bfloat16, both_signs=True)


@dataclass(frozen=True)
class Reference:
    """What the references need of a case, columns in visiting order."""

    weight: oracles.Matrix
    grid: oracles.Grid
    hessian: oracles.Matrix
    gram: oracles.Matrix
    order: np.ndarray


def reference_of(case: Case, fmt: QuantFormat, scales: Tensor, zeros: Tensor | None = None) -> Reference:
    gram = case.gram.double().numpy()
    order = oracles.visiting_order(gram)
    step = expand_scales(scales, case.weight.shape[1]).double().numpy()[:, order]
    gram = gram[np.ix_(order, order)]
    zero = np.zeros_like(step)
    if zeros is not None:
        zero = expand_scales(zeros, case.weight.shape[1]).double().numpy()[:, order]
    grid = oracles.Grid(step, zero, fmt.min_code, fmt.max_code)
    return Reference(case.weight.double().numpy()[:, order], grid, oracles.damped(gram, DAMPING), gram, order)


def assert_matches(codes: Tensor, rounded: oracles.Rounded, reference: Reference) -> None:
    """Equal codes but for ties: the first code of a row that differs lay on one, and few differ at all."""
    found = codes.numpy().astype(np.float64)[:, reference.order]
    expected, values = rounded
    differs = found != expected
    assert differs.mean() <= 0.005
    for row in np.flatnonzero(differs.any(axis=1)):
        # Later columns of the row inherit the difference; only the first one has to be a tie.
        first = values[row, np.argmax(differs[row])]
        assert abs(first - np.floor(first) - 0.5) < TIE
    weight, step, zero = reference.weight, reference.grid.step, reference.grid.zero
    reached = oracles.objective((found - zero) * step - weight, reference.gram)
    assert reached == pytest.approx(oracles.objective((expected - zero) * step - weight, reference.gram), rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_gptq_equals_both_reference_forms(rows: int, columns: int, group_size: int, bits: int) -> None:
    case, fmt = make_case(rows, columns), QuantFormat(bits, group_size)
    scales = scales_of(case, fmt)
    reference = reference_of(case, fmt, scales)
    in_place = oracles.gptq(reference.weight, reference.grid, reference.hessian)
    feedback = oracles.gptq_feedback(reference.weight, reference.grid, reference.hessian)
    assert np.array_equal(in_place[0], feedback[0]), "the two forms are one algorithm"
    assert_matches(run(case, fmt, scales, beta=0.0), in_place, reference)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_foem_equals_both_reference_forms(rows: int, columns: int, group_size: int, bits: int, beta: float) -> None:
    case, fmt = make_case(rows, columns), QuantFormat(bits, group_size)
    scales = scales_of(case, fmt)
    reference = reference_of(case, fmt, scales)
    exact = oracles.foem(reference.weight, reference.grid, reference.hessian, beta)
    feedback = oracles.foem_feedback(reference.weight, reference.grid, reference.hessian, beta)
    assert np.array_equal(exact[0], feedback[0]), "the two forms are one algorithm"
    assert_matches(run(case, fmt, scales, beta), exact, reference)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_foem_without_pull_is_gptq(bits: int) -> None:
    case, fmt = make_case(16, 256), QuantFormat(bits, 64)
    reference = reference_of(case, fmt, scales_of(case, fmt))
    arguments = (reference.weight, reference.grid, reference.hessian)
    codes = oracles.gptq(*arguments)[0]
    assert np.array_equal(oracles.foem(*arguments, 0.0)[0], codes)
    assert np.array_equal(oracles.foem_feedback(*arguments, 0.0)[0], codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_full_pull_is_plain_rounding(bits: int) -> None:
    case, fmt = make_case(16, 256), QuantFormat(bits, 64)
    scales = scales_of(case, fmt)
    assert torch.equal(run(case, fmt, scales, beta=1.0), nearest_codes(case.weight, scales, fmt))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.4])
def test_the_loop_tells_what_it_spread_and_rounded(beta: float) -> None:
    case, fmt = make_case(24, 192), QuantFormat(3, 32)
    scales = scales_of(case, fmt)
    reference = reference_of(case, fmt, scales)
    expected, targets = oracles.foem(reference.weight, reference.grid, reference.hessian, beta)
    spread = torch.empty(192, 24)
    codes = run(case, fmt, scales, beta, column_errors=spread)
    alike = (codes.numpy()[:, reference.order] == expected).all(axis=1)  # a tie changes the rest of its row
    assert alike.mean() > 0.8
    rounded = dequantize(codes, scales.float())
    met = targets_at_turn(case.weight, rounded, spread, case.factor, beta).numpy()[:, reference.order]
    # `targets` are in steps.
    wanted = (targets * reference.grid.step)[alike]
    assert np.linalg.norm(met[alike] - wanted) <= 1e-5 * np.linalg.norm(wanted)
    losses = row_losses(case.weight, rounded, case.factor).numpy()
    difference = rounded.double().numpy()[:, reference.order] - reference.weight
    np.testing.assert_allclose(losses, np.einsum("ri,ij,rj->r", difference, reference.hessian, difference), rtol=1e-4)
    if beta == 0:
        np.testing.assert_allclose(spread.square().sum(0).numpy(), losses, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.4])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_foem_of_the_paper_equals_its_reference(rows: int, columns: int, group_size: int, beta: float) -> None:
    case, fmt = make_case(rows, columns), QuantFormat(3, group_size)
    scales = scales_of(case, fmt)
    reference = reference_of(case, fmt, scales)
    arguments = (reference.weight, reference.grid, reference.hessian, beta)
    expected, values = oracles.foem_paper(*arguments)
    code = oracles.foem(*arguments)[0]
    assert np.array_equal(expected, code) if beta == 0 else (expected != code).mean() > 0.02
    spread = torch.empty(columns, rows)
    codes = run(case, fmt, scales, beta, column_errors=spread, paper_form=True)
    assert_matches(codes, (expected, values), reference)
    alike = (codes.numpy()[:, reference.order] == expected).all(axis=1)
    assert alike.mean() > 0.8
    rounded = dequantize(codes, scales.float())
    met = targets_at_turn(case.weight, rounded, spread, case.factor, beta).numpy()[:, reference.order]
    wanted = (values * reference.grid.step)[alike]
    assert np.linalg.norm(met[alike] - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_what_an_error_costs_is_what_later_columns_leave_of_it() -> None:
    case = make_case(4, 48)
    gram = case.gram.double().numpy()
    order = oracles.visiting_order(gram)
    hessian = oracles.damped(gram, DAMPING)[np.ix_(order, order)]
    left = []
    for j in range(48):  # the Schur complement: H_jj less what the best answer of all later columns takes off
        later = hessian[j + 1 :, j]
        left.append(hessian[j, j] - later @ np.linalg.solve(hessian[j + 1 :, j + 1 :], later))
    np.testing.assert_allclose(case.factor.conditional.numpy()[order], left, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_second_pass_makes_no_row_worse_and_the_whole_better(bits: int, symmetric: bool) -> None:
    case, fmt = make_case(64, 192), QuantFormat(bits, 32, symmetric=symmetric)
    tasks = [Task("layer", case.weight, fmt, torch.bfloat16)]
    hessian = oracles.damped(case.gram.double().numpy(), DAMPING)
    losses = []
    for passes in (1, 2, 3):
        weighted = replace(case.statistics, weighted=True)
        (result,) = round_group(tasks, case.factor, RoundingMethod("gptq", passes=passes), weighted)
        error = (
            dequantize(result.codes, result.scales.float(), result.zeros).double().numpy()
            - case.weight.double().numpy()
        )
        losses.append(np.einsum("ri,ij,rj->r", error, hessian, error))
    assert (losses[1] <= losses[0] * (1 + 1e-5)).all() and (losses[2] <= losses[1] * (1 + 1e-5)).all()
    assert losses[1].sum() < 0.99 * losses[0].sum()


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_block_size_does_not_matter(beta: float) -> None:
    # In float64, so that the order of summation cannot decide a tie.
    base, fmt = make_case(16, 320), QuantFormat(3, 32)
    scales = scales_of(base, fmt)
    factor = replace(base.factor, upper=base.factor.upper.double())
    weight, step = base.weight.double(), expand_scales(scales, 320).double()
    lowest, highest = (weight.new_full((16,), float(v)) for v in (fmt.min_code, fmt.max_code))
    grids = RowGrids(step, lowest, highest)
    results = [round_compensated(weight, grids, factor, beta, size) for size in (320, 1, 7, 64, 128, 1000)]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_natural_order_is_kept_without_act_order() -> None:
    case = make_case(12, 96)
    factor = factorize(case.gram, case.num_tokens, DAMPING, act_order=False)
    assert factor.order.tolist() == list(range(96))
    upper = factor.upper.double()
    hessian = torch.from_numpy(oracles.damped(case.gram.double().numpy(), DAMPING))
    torch.testing.assert_close(upper.T @ upper @ hessian, torch.eye(96).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 128, 577, 700])
def test_a_matrix_is_factored_and_inverted_by_halves(size: int) -> None:
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    matrix = noise @ noise.t() / size + torch.eye(size)
    inverse, failed = inverse_cholesky(matrix.clone())
    assert not bool(failed)
    torch.testing.assert_close(inverse, torch.linalg.inv(torch.linalg.cholesky(matrix)), rtol=1e-9, atol=1e-12)
    matrix[size // 2, size // 2] = -1.0
    assert bool(inverse_cholesky(matrix)[1])


@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_factor_in_float32_is_as_good_as_in_float64(spread: float) -> None:
    # A few columns rule the diagonal, so that the others have little more than the damping.
    size = 640
    noise = torch.randn(2048, size, generator=torch.Generator().manual_seed(3))
    noise[:, :4] *= spread
    gram = noise.t() @ noise / len(noise)
    factor = factorize(gram, 100_000)
    exact = oracles.damped(gram.double().numpy(), DAMPING)[np.ix_(factor.order, factor.order)]
    reference = torch.from_numpy(oracles.upper_factor(exact))
    error = (factor.upper.double() - reference).norm(dim=1) / reference.norm(dim=1)
    assert error.max() < 1e-4


def test_factor_agrees_with_the_explicit_inverse() -> None:
    case = make_case(12, 96)
    gram = case.gram.double().numpy()
    order = oracles.visiting_order(gram)
    hessian = oracles.damped(gram, DAMPING)[np.ix_(order, order)]
    assert np.array_equal(case.factor.order.numpy(), order)
    np.testing.assert_allclose(case.factor.upper.numpy(), oracles.upper_factor(hessian), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(case.factor.pivots.numpy(), np.diag(oracles.right_factor(hessian)), rtol=1e-5)
    np.testing.assert_allclose(case.factor.diagonal.numpy()[order], np.diag(hessian), rtol=1e-5)


@pytest.mark.parametrize("method", ["rtn", "gptq", "foem"])
@pytest.mark.parametrize("group_size", [32, CHANNEL])
def test_more_bits_never_hurt(method: str, group_size: int) -> None:
    case = make_case(24, 256, seed=3)
    errors = [
        round_layers([task(case, bits, group_size)], case.statistics, case.factor, RoundingMethod(method))[0].metrics
        for bits in range(2, 9)
    ]
    reached = [m.output_error for m in errors]
    assert all(more < 0.6 * fewer for fewer, more in zip(reached, reached[1:], strict=False))


def task(case: Case, bits: int, group_size: int, dtype: torch.dtype = torch.bfloat16, name: str = "layer") -> Task:
    return Task(name, case.weight, QuantFormat(bits, group_size), dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_compensation_beats_plain_rounding(bits: int, seed: int) -> None:
    case = make_case(24, 256, seed)
    layer = round_layers([task(case, bits, 64)], case.statistics, case.factor, RoundingMethod("gptq"))[0]
    assert layer.metrics.output_error < 0.9 * layer.metrics.rtn_error
    # Clipping adds to the prediction, which knows only rounding; at 2 bits a lot is clipped.
    assert 0.7 < layer.metrics.output_error / layer.metrics.predicted_error < (2.5 if bits == 2 else 1.6)


def test_metrics_are_what_they_say() -> None:
    case, fmt = make_case(24, 256), QuantFormat(3, 64)
    layer = round_layers([task(case, 3, 64)], case.statistics, case.factor, RoundingMethod("gptq"))[0]
    gram, weight = case.gram.double().numpy(), case.weight.double().numpy()
    difference = dequantize(layer.codes, layer.scales).double().numpy() - weight
    power = oracles.objective(weight, gram)
    assert layer.metrics.output_error == pytest.approx(oracles.objective(difference, gram) / power, rel=1e-4)
    assert layer.metrics.weight_error == pytest.approx((difference**2).sum() / (weight**2).sum(), rel=1e-4)
    grid = reference_of(case, fmt, layer.scales).grid
    order = oracles.visiting_order(gram)
    pivots = np.diag(oracles.right_factor(oracles.damped(gram, DAMPING)[np.ix_(order, order)]))
    assert layer.metrics.predicted_error == pytest.approx(((pivots * grid.step) ** 2).sum() / 12 / power, rel=1e-4)
    scaled = weight / expand_scales(layer.scales, 256).double().numpy()
    clipped = (scaled < fmt.min_code - 0.5) | (scaled > fmt.max_code + 0.5)
    assert layer.metrics.clip_rate == pytest.approx(clipped.mean(), abs=0.05)
    assert quadratic_form(case.weight, case.gram).item() == pytest.approx(power, rel=1e-4)
    assert (layer.metrics.damping, layer.metrics.damping_retries, layer.metrics.dead_inputs) == (DAMPING, 0, 0)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_dead_inputs_are_rounded_plainly(beta: float) -> None:
    base, fmt = make_case(16, 96), QuantFormat(3, 32)
    dead = torch.tensor([0, 17, 95])
    gram = base.gram.clone()
    gram[dead], gram[:, dead] = 0.0, 0.0
    case = Case(base.weight, gram, base.num_tokens)
    assert case.factor.dead_inputs == 3
    scales = scales_of(case, fmt)
    codes, nearest = run(case, fmt, scales, beta), nearest_codes(case.weight, scales, fmt)
    assert torch.equal(codes[:, dead], nearest[:, dead])
    assert not torch.equal(codes, nearest)


def test_all_inputs_dead() -> None:
    case, fmt = Case(make_case(16, 96).weight, torch.zeros(96, 96), 100), QuantFormat(4, 32)
    layer = round_layers([task(case, 4, 32)], case.statistics, case.factor, RoundingMethod("gptq"))[0]
    assert torch.equal(layer.codes, nearest_codes(case.weight, layer.scales, fmt))
    assert layer.metrics.dead_inputs == 96


def test_damping_is_raised_on_a_singular_matrix_and_reported() -> None:
    few = make_case(16, 96, tokens=20)
    gram = few.gram.clone()
    gram[:, 5], gram[5] = 0.0, 0.0
    factor = factorize(gram, 20, damping=0.0)
    assert factor.retries >= 1 and factor.damping > 0
    assert bool(torch.isfinite(factor.upper).all())
    assert factorize(gram, 20, damping=0.05).retries == 0
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 100.0
    with pytest.raises(NumericalError, match="Cholesky failed"):
        factorize(indefinite, 20, damping=0.0)


def test_default_damping_depends_on_tokens_per_column() -> None:
    assert default_damping(8 * 96, 96) == 0.05
    assert default_damping(8 * 96 - 1, 96) == 0.2
    assert factorize(make_case(16, 96).gram, 100).damping == 0.2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_that_is_not_finite_raises(value: float) -> None:
    gram = make_case(16, 96).gram.clone()
    gram[3, 4] = value
    with pytest.raises(NumericalError, match="NaN or Inf"):
        factorize(gram, 2000)


def test_weight_that_is_not_finite_raises() -> None:
    base = make_case(16, 96)
    weight = base.weight.clone()
    weight[2, 3] = float("nan")
    broken = Task("model.layers.0.mlp.up_proj", weight, QuantFormat(4, 32), torch.bfloat16)
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj"):
        round_layers([broken], base.statistics, base.factor, RoundingMethod("gptq"))


def group_errors(case: Case, scales: Tensor, fmt: QuantFormat) -> np.ndarray:
    """Weighted error of every (row, group), in float64."""
    importance = case.factor.diagonal.double().numpy()
    weight, step = case.weight.double().numpy(), scales.double().numpy()
    width = fmt.group_width(weight.shape[1])
    return np.array(
        [
            [
                oracles.scale_error(w, c, s, fmt.bits)
                for w, c, s in zip(row.reshape(-1, width), importance.reshape(-1, width), steps, strict=True)
            ]
            for row, steps in zip(weight, step, strict=True)
        ]
    )


@pytest.mark.parametrize("both_signs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scale_search_equals_the_reference_list(bits: int, dtype: torch.dtype, both_signs: bool) -> None:
    case, fmt = make_case(12, 96), QuantFormat(bits, 32)
    scales = search_scales(case.weight, case.factor.diagonal, fmt, dtype, both_signs)
    assert scales.dtype == dtype and scales.shape == (12, 3)
    importance = case.factor.diagonal.double().numpy()
    signs = (1.0, -1.0) if both_signs else (1.0,)
    found = group_errors(case, scales, fmt)
    same = 0
    for (row, group), error in np.ndenumerate(found):
        part = slice(32 * group, 32 * group + 32)
        weights = case.weight[row, part].double().numpy()
        scale, best = oracles.two_stage_scale(weights, importance[part], bits, dtype, signs, COARSE_STEPS, FINE_STEPS)
        assert error == pytest.approx(best, rel=1e-3)
        same += float(scales[row, group]) == pytest.approx(scale, rel=1e-6)
    assert same >= 0.97 * found.size
    # At 8 bits nothing clips, both signs give the same error, and the positive one is tried first.
    if bits < 8 or not both_signs:
        assert both_signs == bool((scales < 0).any())


@pytest.mark.parametrize("group_size", [32, CHANNEL])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_search_is_never_worse_than_simpler_rules(bits: int, group_size: int) -> None:
    case, fmt = make_case(24, 96), QuantFormat(bits, group_size)
    positive, both = (
        search_scales(case.weight, case.factor.diagonal, fmt, torch.bfloat16, signs) for signs in (False, True)
    )
    peak = case.weight.reshape(24, -1, fmt.group_width(96)).abs().amax(-1)
    min_max = (peak / fmt.max_code).to(torch.bfloat16)
    one, two, plain = (group_errors(case, scales, fmt) for scales in (positive, both, min_max))
    assert (one <= plain * (1 + 1e-6)).all()
    assert (two <= plain * (1 + 1e-6)).all()
    assert two.sum() <= one.sum()
    # The fine list is tried with one sign, so a rare group would have done better with the other.
    assert (two > one * (1 + 1e-6)).mean() <= 0.02


@pytest.mark.parametrize(("bits", "slack"), [(2, 1.03), (3, 1.03), (4, 1.03), (8, 1.15)])
def test_search_comes_close_to_an_exhaustive_grid(bits: int, slack: float) -> None:
    # At 8 bits the error of 32 weights is a noise in the scale: more candidates always find a luckier one.
    case, fmt = make_case(16, 96, seed=2), QuantFormat(bits, 32)
    scales = search_scales(case.weight, case.factor.diagonal, fmt, torch.bfloat16, both_signs=True)
    importance = case.factor.diagonal.double().numpy()
    best = [
        oracles.exhaustive_scale(w, c, bits, torch.bfloat16, (1.0, -1.0), 400)[1]
        for row in case.weight.double().numpy()
        for w, c in zip(row.reshape(-1, 32), importance.reshape(-1, 32), strict=True)
    ]
    assert group_errors(case, scales, fmt).sum() <= slack * sum(best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["rtn", "gptq", "foem"])
def test_zero_rows_and_vanishing_weights_give_zero_codes(method: str, dtype: torch.dtype) -> None:
    base = make_case(16, 96)
    weight = base.weight.clone()
    weight[3] = 0.0
    weight[5, 32:64] = 0.0
    # So small that every candidate scale underflows in the stored dtype, or in float32 arithmetic.
    weight[7] = 1e-42
    ((codes, scales, *_),) = round_group(
        [Task("layer", weight, QuantFormat(4, 32), dtype)], base.factor, RoundingMethod(method)
    )
    assert bool(torch.isfinite(scales).all()) and bool((scales != 0).all())
    assert not codes[[3, 7]].any()
    assert (scales[3] > 0).all() and scales[5, 1] > 0
    if method == "rtn":
        assert not codes[5, 32:64].any()


def test_small_float16_scales_are_searched_too() -> None:
    """fp16 scales below 6e-5 are subnormal, coarse but usable: their error is measured like any other."""
    base = make_case(16, 96)
    case, fmt = Case(base.weight * 0.02, base.gram, base.num_tokens), QuantFormat(8, 32)
    scales = search_scales(case.weight, case.factor.diagonal, fmt, torch.float16, both_signs=True)
    assert float(scales.abs().max()) < torch.finfo(torch.float16).tiny
    peak = case.weight.reshape(16, 3, 32).abs().amax(-1)
    min_max = group_errors(case, (peak / 127).half(), fmt)
    found = group_errors(case, scales, fmt)
    assert (found <= min_max * (1 + 1e-6)).all()
    assert found.sum() < 0.97 * min_max.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_computes_in_the_stored_dtype(dtype: torch.dtype) -> None:
    case, fmt = make_case(12, 96), QuantFormat(8, 32)
    scales = search_scales(case.weight, case.factor.diagonal, fmt, dtype, both_signs=True)
    codes = nearest_codes(case.weight, scales, fmt)
    values = dequantize(codes, scales)
    assert values.dtype == dtype
    for row, column in [(0, 0), (3, 40), (11, 95)]:
        assert values[row, column] == codes[row, column].to(dtype) * scales[row, column // 32]


@pytest.mark.parametrize("method", ["rtn", "gptq", "foem"])
def test_stacked_formats_give_the_same_codes_as_single_ones(method: str) -> None:
    first, second = make_case(24, 256), make_case(40, 256, seed=9)
    tasks = [task(first, 2, 64), task(first, 8, CHANNEL), task(second, 3, 32, torch.float16), task(second, 4, 128)]
    rounding = RoundingMethod(method)
    stacked = round_group(tasks, first.factor, rounding)
    for one, (codes, scales, *_) in zip(tasks, stacked, strict=True):
        ((alone, alone_scales, *_),) = round_group([one], first.factor, rounding)
        assert torch.equal(scales, alone_scales)
        assert codes.dtype == torch.int8 and codes.shape == one.weight.shape
        assert torch.equal(codes, alone)
        assert codes.min() >= one.quant_format.min_code and codes.max() <= one.quant_format.max_code


def test_large_weights_are_searched_in_chunks_without_change() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 512, generator=generator)
    fmt, ones = QuantFormat(3, 64), torch.ones(512)
    whole = search_scales(weight, ones, fmt, torch.bfloat16, both_signs=True)
    parts = [search_scales(weight[i : i + 100], ones, fmt, torch.bfloat16, both_signs=True) for i in range(0, 700, 100)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("rows", "width"), [(5, 3), (7, 256), (4, 600)])
def test_quadratic_form_of_any_width(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, error = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (2 * width, rows))
    expected = float((error @ x.t()).square().sum())
    found = float(quadratic_form(error.float(), (x.t() @ x).float()))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_eager_column_loop_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setenv(VARIABLE, EAGER)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    gram = torch.eye(32)
    ones = torch.ones(4, 32)
    round_compensated(ones, RowGrids(ones, -4 * ones[:, 0], 3 * ones[:, 0]), factorize(gram, 64))
    assert threads == [1, 2]
