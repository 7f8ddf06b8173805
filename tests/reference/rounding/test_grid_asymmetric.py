"""Asymmetric grids against the slow references, and beside the symmetric ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.rounding import grid
from hawqtool.rounding.grid import (
    COARSE_STEPS,
    FINE_STEPS,
    dequantize,
    expand_scales,
    nearest_codes,
    search_scales,
    search_zeros,
)
from hawqtool.rounding.layer import round_group, round_layers
from hawqtool.rounding.method import RoundingMethod, Task
from tests.reference.rounding.test_layer import DAMPING, Case, assert_matches, make_case, reference_of, run
from tests.support import oracles

METHODS = ("rtn", "gptq", "foem")
SHAPES = [(24, 96, 32), (20, 100, CHANNEL)]


def asymmetric(bits: int, group_size: int) -> QuantFormat:
    return QuantFormat(bits, group_size, symmetric=False)


def shifted(case: Case, shift: float) -> Case:
    """The case with weights moved off zero by so many of their standard deviations, rows by turns up and down."""
    signs = torch.tensor([1.0, -1.0]).repeat(len(case.weight))[: len(case.weight), None]
    return replace(case, weight=case.weight + shift * 0.02 * signs)


def grid_of(case: Case, fmt: QuantFormat, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return search_zeros(case.weight, case.factor.diagonal, fmt, dtype)


def group_errors(case: Case, fmt: QuantFormat, scales: Tensor, zeros: Tensor) -> np.ndarray:
    """Weighted error of every (row, group), in float64."""
    width = fmt.group_width(case.weight.shape[1])
    importance = case.factor.diagonal.double().numpy().reshape(-1, width)
    weight = case.weight.double().numpy().reshape(len(case.weight), -1, width)
    found = np.empty(scales.shape)
    for row, group in np.ndindex(found.shape):
        scale, zero = float(scales[row, group]), int(zeros[row, group])
        found[row, group] = oracles.asymmetric_error(weight[row, group], importance[group], scale, zero, fmt.bits)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_search_equals_the_reference_list(shift: float, bits: int, dtype: torch.dtype) -> None:
    case, fmt = shifted(make_case(12, 96), shift), asymmetric(bits, 32)
    scales, zeros = grid_of(case, fmt, dtype)
    assert (scales.dtype, scales.shape, zeros.dtype, zeros.shape) == (dtype, (12, 3), torch.int8, (12, 3))
    assert (scales > 0).all()
    assert zeros.min() >= fmt.min_code and zeros.max() <= fmt.max_code
    importance = case.factor.diagonal.double().numpy()
    found = group_errors(case, fmt, scales, zeros)
    same = 0
    for (row, group), error in np.ndenumerate(found):
        part = slice(32 * group, 32 * group + 32)
        weights = case.weight[row, part].double().numpy()
        scale, zero, best = oracles.two_stage_grid(weights, importance[part], bits, dtype, COARSE_STEPS, FINE_STEPS)
        assert error == pytest.approx(best, rel=1e-3)
        same += (float(scales[row, group]), int(zeros[row, group])) == (pytest.approx(scale, rel=1e-6), zero)
    assert same >= 0.9 * found.size


@pytest.mark.parametrize(("bits", "slack"), [(2, 1.02), (3, 1.03), (4, 1.08)])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_search_comes_close_to_all_scales_and_zeros(shift: float, bits: int, slack: float) -> None:
    case, fmt = shifted(make_case(8, 96, seed=2), shift), asymmetric(bits, 32)
    importance = case.factor.diagonal.double().numpy()
    best = [
        oracles.exhaustive_grid(w, c, bits, torch.bfloat16, 200)
        for row in case.weight.double().numpy()
        for w, c in zip(row.reshape(-1, 32), importance.reshape(-1, 32), strict=True)
    ]
    assert group_errors(case, fmt, *grid_of(case, fmt)).sum() <= slack * sum(best)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_column_loop_equals_both_reference_forms(
    rows: int, columns: int, group_size: int, bits: int, beta: float
) -> None:
    case, fmt = shifted(make_case(rows, columns), 1.0), asymmetric(bits, group_size)
    scales, zeros = grid_of(case, fmt)
    reference = reference_of(case, fmt, scales, zeros)
    arguments = (reference.weight, reference.grid, reference.hessian)
    if beta:
        exact, feedback = oracles.foem(*arguments, beta), oracles.foem_feedback(*arguments, beta)
    else:
        exact, feedback = oracles.gptq(*arguments), oracles.gptq_feedback(*arguments)
    assert np.array_equal(exact[0], feedback[0]), "the two forms are one algorithm"
    assert_matches(run(case, fmt, scales, beta, block_size=32, zeros=zeros), exact, reference)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_plain_rounding_equals_the_reference(rows: int, columns: int, group_size: int, bits: int) -> None:
    case, fmt = shifted(make_case(rows, columns), 1.0), asymmetric(bits, group_size)
    scales, zeros = grid_of(case, fmt)
    reference = reference_of(case, fmt, scales, zeros)
    assert_matches(
        nearest_codes(case.weight, scales, fmt, zeros), oracles.plain(reference.weight, reference.grid), reference
    )
    assert torch.equal(run(case, fmt, scales, 1.0, zeros=zeros), nearest_codes(case.weight, scales, fmt, zeros))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_of_zero_reproduces_the_symmetric_codes(bits: int, beta: float) -> None:
    case, fmt = make_case(16, 256), QuantFormat(bits, 64)
    scales = search_scales(case.weight, case.factor.diagonal, fmt, torch.bfloat16, both_signs=True)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    codes = run(case, fmt, scales, beta)
    assert torch.equal(run(case, fmt, scales, beta, zeros=zeros), codes)
    assert torch.equal(nearest_codes(case.weight, scales, fmt, zeros), nearest_codes(case.weight, scales, fmt))
    assert torch.equal(dequantize(codes, scales, zeros), dequantize(codes, scales))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_negative_scale_is_another_zero(bits: int) -> None:
    """Why only positive scales are searched: s (q - z) over all q is the same set as -s (q' - (-1 - z))."""
    fmt = asymmetric(bits, 32)
    codes = torch.arange(fmt.min_code, fmt.max_code + 1)
    for zero in range(fmt.min_code, fmt.max_code + 1):
        mirrored = -(codes - (-1 - zero))
        assert torch.equal(mirrored.sort().values, (codes - zero).sort().values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [32, CHANNEL])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errors_beside_the_symmetric_grid(bits: int, group_size: int, method: str) -> None:
    """Never worse than symmetric by more than noise, and much better where the weights are shifted."""
    for shift, most in ((0.0, 1.04), (0.5, 1.03), (2.0, 0.72)):
        case = shifted(make_case(48, 128, seed=3), shift)
        errors = [
            round_layers(
                [Task("layer", case.weight, QuantFormat(bits, group_size, symmetric), torch.bfloat16)],
                case.statistics,
                case.factor,
                RoundingMethod(method),
            )[0].metrics.output_error
            for symmetric in (True, False)
        ]
        assert errors[1] <= most * errors[0], shift


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zero_rows_vanishing_and_one_sided_weights(dtype: torch.dtype, method: str) -> None:
    base = make_case(16, 96)
    weight = base.weight.clone()
    weight[3] = 0.0
    # So small that every candidate scale underflows in the stored dtype, or in float32 arithmetic.
    weight[7] = 1e-42
    weight[8], weight[9] = 0.5, -0.5
    fmt = asymmetric(4, 32)
    ((codes, scales, zeros, _),) = round_group([Task("layer", weight, fmt, dtype)], base.factor, RoundingMethod(method))
    assert zeros is not None
    assert bool(torch.isfinite(scales).all()) and (scales > 0).all()
    assert not dequantize(codes, scales, zeros)[[3, 7]].any()
    assert zeros[8].tolist() == [fmt.min_code] * 3 and zeros[9].tolist() == [fmt.max_code] * 3
    if method == "rtn":
        assert torch.allclose(dequantize(codes, scales, zeros)[8:10].float(), weight[8:10], rtol=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_stacked_kinds_give_the_same_codes_as_single_ones(method: str) -> None:
    first, second = shifted(make_case(24, 256), 1.0), make_case(40, 256, seed=9)
    formats = (asymmetric(2, 64), QuantFormat(8, CHANNEL), QuantFormat(3, 32), asymmetric(4, 128))
    weights = (first.weight, first.weight, second.weight, second.weight)
    tasks = [Task("layer", w, f, torch.bfloat16) for w, f in zip(weights, formats, strict=True)]
    rounding = RoundingMethod(method)
    for one, stacked in zip(tasks, round_group(tasks, first.factor, rounding), strict=True):
        (alone,) = round_group([one], first.factor, rounding)
        assert torch.equal(stacked.codes, alone.codes) and torch.equal(stacked.scales, alone.scales)
        assert (stacked.zeros is None) == one.quant_format.symmetric
        assert stacked.zeros is None or torch.equal(stacked.zeros, alone.zeros)
        assert stacked.codes.min() >= one.quant_format.min_code and stacked.codes.max() <= one.quant_format.max_code


def test_metrics_are_what_they_say() -> None:
    case, fmt = shifted(make_case(24, 256), 1.0), asymmetric(3, 64)
    task = Task("layer", case.weight, fmt, torch.bfloat16)
    layer = round_layers([task], case.statistics, case.factor, RoundingMethod("gptq"))[0]
    assert layer.zeros is not None
    gram, weight = case.gram.double().numpy(), case.weight.double().numpy()
    power = oracles.objective(weight, gram)
    step, zero = (expand_scales(t, 256).double().numpy() for t in (layer.scales, layer.zeros))
    values = dequantize(layer.codes, layer.scales, layer.zeros).double().numpy()
    np.testing.assert_allclose(values, (layer.codes.numpy() - zero) * step, rtol=2**-8)
    assert layer.metrics.output_error == pytest.approx(oracles.objective(values - weight, gram) / power, rel=1e-4)
    assert layer.metrics.weight_error == pytest.approx(((values - weight) ** 2).sum() / (weight**2).sum(), rel=1e-4)
    codes = nearest_codes(case.weight, layer.scales, fmt, layer.zeros)
    plain = dequantize(codes, layer.scales, layer.zeros).double().numpy()
    assert layer.metrics.rtn_error == pytest.approx(oracles.objective(plain - weight, gram) / power, rel=1e-4)
    order = oracles.visiting_order(gram)
    pivots = np.diag(oracles.right_factor(oracles.damped(gram, DAMPING)[np.ix_(order, order)]))
    expected = ((pivots * step[:, order]) ** 2).sum() / 12 / power
    assert layer.metrics.predicted_error == pytest.approx(expected, rel=1e-4)
    scaled = weight / step + zero
    clipped = (scaled < fmt.min_code - 0.5) | (scaled > fmt.max_code + 0.5)
    assert layer.metrics.clip_rate == pytest.approx(clipped.mean(), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_is_exact_for_every_code_and_zero(dtype: torch.dtype) -> None:
    zeros = torch.arange(-128, 128, dtype=torch.int8)[:, None]
    codes = torch.arange(-128, 128, dtype=torch.int8).expand(256, 256)
    scales = torch.full((256, 1), 0.0123).to(dtype)
    expected = (codes.int() - zeros.int()).to(dtype) * scales
    assert torch.equal(dequantize(codes, scales, zeros), expected)


def test_large_weights_are_searched_in_chunks_without_change(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 512, generator=torch.Generator().manual_seed(0)) + 0.5
    fmt, ones = asymmetric(3, 64), torch.ones(512)
    whole = search_zeros(weight, ones, fmt, torch.bfloat16)
    monkeypatch.setattr(grid, "_CHUNK_ELEMENTS", 512 * 9)
    parts = search_zeros(weight, ones, fmt, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
