"""Output-side feedback against sequential rounding of the dense kron(S, H), and what it is for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.records import OutputMoments
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.gram import gram
from hawqtool.rounding.grid import Quantized, dequantize, search_scales
from hawqtool.rounding.input_drift import best_shift
from hawqtool.rounding.layer import choose_settings, round_layers
from hawqtool.rounding.method import BETAS, LayerSettings, RoundingMethod, Task
from hawqtool.rounding.output_feedback import (
    RowFeedback,
    choose_moments,
    pack_lower,
    predicted_ratios,
    round_row_blocks,
    row_blocks,
    row_feedback,
    unpack_lower,
)
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.rounding.two_pass import Problem, prepare, round_targets
from hawqtool.runtime.stage_timer import UNRECORDED
from tests.support import oracles

FMT, DAMPING, LAMBDA = QuantFormat(3, 32), 0.05, 0.1


def correlated(tokens: int, width: int, seed: int, rank: int = 4) -> Tensor:
    """Vectors ``[tokens, width]`` with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return strong + 0.3 * torch.randn(tokens, width, generator=generator) * torch.linspace(0.5, 2, width)


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Task, GroupStatistics, Factor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    hessian = gram(correlated(2000, columns, seed + 1))
    statistics = GroupStatistics(hessian, 2000, 2000, weighted=True)
    return Task("layer", weight, FMT, torch.bfloat16), statistics, factorize(hessian, 2000, DAMPING)


def moments_of(rows: int, seed: int = 7) -> OutputMoments:
    return OutputMoments(0.5, LAMBDA, pack_lower(gram(correlated(1500, rows, seed))))


def loss(result: Quantized, target: Tensor, across: Tensor, hessian: Tensor) -> float:
    error = (dequantize(*result).float() - target).double()
    return float((across.double() @ error @ hessian.double() * error).sum())


@pytest.mark.parametrize("seed", range(4))
def test_row_by_row_it_is_sequential_rounding_of_the_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows or by columns first: float64 GPTQ of the flattened weight with kron(S, H) and with kron(H, S)."""
    rows, columns = 9, 32
    task, statistics, factor = layer(rows, columns, seed)
    feedback = row_feedback(moments_of(rows, seed + 3), torch.device("cpu"))
    assert feedback is not None
    order, places = feedback.factor.order.numpy(), factor.order.numpy()
    scales = search_scales(task.weight, factor.diagonal, FMT, torch.float32, both_signs=True)
    left = iter(order)  # the scales are given, so that the codes are all that is to be found
    monkeypatch.setattr(Problem, "search", lambda *_: (scales[[next(left)]], None))
    problem = prepare([task], factor, RoundingMethod(), None, [LayerSettings()], UNRECORDED)
    found = round_row_blocks(problem, 0.0, RowFeedback(feedback.factor, rows)).codes.numpy()[np.ix_(order, places)]
    across = unpack_lower(moments_of(rows, seed + 3).lower).double().numpy()  # type: ignore[arg-type]
    s = oracles.damped(across, LAMBDA)[np.ix_(order, order)]
    h = oracles.damped(statistics.gram.double().numpy(), DAMPING)[np.ix_(places, places)]
    weight = task.weight.double().numpy()[np.ix_(order, places)]
    step = scales.double().numpy()[order].repeat(columns, axis=1)

    def grid(values: np.ndarray) -> oracles.Grid:
        return oracles.Grid(values, np.zeros_like(values), FMT.min_code, FMT.max_code)

    by_rows, _ = oracles.gptq(weight.reshape(1, -1), grid(step.reshape(1, -1)), np.kron(s, h))
    by_columns, _ = oracles.gptq(weight.T.reshape(1, -1), grid(step.T.reshape(1, -1)), np.kron(h, s))
    assert np.array_equal(by_rows.reshape(rows, columns), by_columns.reshape(columns, rows).T)
    assert np.array_equal(found, by_rows.reshape(rows, columns))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("refits", [False, True])
def test_blocks_of_rows_round_what_is_best_given_those_before(beta: float, refits: bool) -> None:
    """T_b = W_b - S_rr⁻¹ S_rd (Q_d - W_d) in float64, with sub-blocks of S as it is."""
    rows = 50
    task, statistics, factor = layer(rows, 64)
    feedback = row_feedback(moments_of(rows), torch.device("cpu"))
    assert feedback is not None
    feedback = RowFeedback(feedback.factor, 12)
    problem = prepare([task], factor, RoundingMethod(), statistics, [LayerSettings()], UNRECORDED)
    found = round_row_blocks(problem, beta, feedback, statistics.gram if refits else None)
    order = feedback.factor.order
    across = unpack_lower(moments_of(rows).lower).double()  # type: ignore[arg-type]
    across.diagonal().add_(LAMBDA * across.diagonal().mean())
    across, error = across[order][:, order], torch.zeros(rows, 64, dtype=torch.float64)
    assert len(row_blocks(rows, 12)) == 10 and feedback.blocks[-1] == slice(45, 50)
    for part in feedback.blocks:
        rest, done = across[part.start :, part.start :], across[part.start :, : part.start]
        target = task.weight[order][part].double()
        if part.start:
            target = target - torch.linalg.solve(rest, done @ error[: part.start])[: part.stop - part.start]
        result = Quantized(found.codes[order[part]], found.scales[order[part]], None)
        part_task = replace(task, weight=target.float())
        single = replace(problem, tasks=[part_task], targets=[target.float()], goals=[target.float()])
        single = replace(single, grids=[single.search(part_task, target.float())])
        (expected,) = round_targets(single, [beta])
        if not refits:
            assert (expected.codes != result.codes).float().mean() < 0.005  # ties
            torch.testing.assert_close(result.scales, expected.scales, rtol=0.02, atol=0)
        error[part] = dequantize(*result).double() - task.weight[order][part]


def test_without_correlations_no_code_changes() -> None:
    task, statistics, factor = layer(40, 96)
    diagonal = OutputMoments(0.5, LAMBDA, pack_lower(torch.diag(torch.linspace(3, 0, 40))))
    for method in (RoundingMethod(), RoundingMethod("foem")):
        plain, fed = (round_layers([task], statistics, factor, method, moments=m)[0] for m in (None, diagonal))
        assert torch.equal(plain.codes, fed.codes) and torch.equal(plain.scales, fed.scales)
        assert (plain.metrics.feedback_blocks, fed.metrics.feedback_blocks) == (0, 14)


def test_the_loss_falls_where_the_output_error_grows() -> None:
    task, statistics, factor = layer(96, 128)
    moments, across = moments_of(96), gram(correlated(1500, 96, 7))
    plain, fed = (round_layers([task], statistics, factor, RoundingMethod(), moments=m)[0] for m in (None, moments))
    losses = [loss(Quantized(r.codes, r.scales, None), task.weight, across, statistics.gram) for r in (plain, fed)]
    assert losses[1] < 0.5 * losses[0]
    assert fed.metrics.output_error > 1.05 * plain.metrics.output_error
    assert (fed.metrics.feedback_ratio, fed.metrics.feedback_damping, fed.metrics.feedback_blocks) == (0.5, LAMBDA, 16)


def test_settings_are_chosen_by_the_loss() -> None:
    """The held-out error is tr(S E H Eᵀ), of shifts as well as of roundings."""
    task, statistics, factor = layer(32, 64)
    statistics.drift = 0.3 * statistics.gram
    held = GroupStatistics(1.1 * statistics.gram, 500, 500, weighted=True)
    held.drift = 0.2 * held.gram
    statistics += replace(held, held_out=replace(held))
    across = gram(correlated(400, 32, 8))
    moments = replace(moments_of(32), held_out=pack_lower(across))
    moments = replace(moments, lower=moments.lower + moments.held_out)  # type: ignore[operator]
    method = RoundingMethod("foem", "auto", shift="auto", refit=True)
    (settings,) = choose_settings([task], factor, method, statistics, moments=moments)
    # Either drift is a share of H, so that the best shift is the same in all directions.
    assert settings.shift == pytest.approx(0.2 / 0.3, rel=0.1)
    rows, fitting = row_feedback(moments, torch.device("cpu"), fitting=True), statistics.fitting
    part = factorize(statistics.fitting.gram, 2000, DAMPING)  # type: ignore[union-attr]
    assert rows is not None and fitting is not None
    problem = prepare([task], part, method, fitting, [settings], UNRECORDED)
    errors = {}
    for beta in BETAS:
        for refits in (False, True):
            error = dequantize(*round_row_blocks(problem, beta, rows, fitting.gram if refits else None)).double()
            error = error - task.weight.double()
            moved = error @ held.gram.double() - 2 * task.weight.double() @ held.drift.double()
            errors[beta, refits] = float((across.double() @ error * moved).sum())
    best = min(errors[beta, False] for beta in BETAS)
    assert errors[settings.beta, False] == pytest.approx(best, rel=1e-4)
    assert settings.refit == (errors[settings.beta, True] < errors[settings.beta, False])
    shift = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    gain = (across.double() @ shift.double() * (task.weight.double() @ held.drift.double())).sum()
    cost = (across.double() @ shift.double() @ held.gram.double() * shift.double()).sum()
    assert best_shift(task.weight, shift, held, across) == pytest.approx(float((gain / cost).clamp(0, 1)), abs=1e-4)


@pytest.mark.parametrize("rows", [60, 64])
def test_the_predicted_ratio_is_that_of_independent_errors(rows: int) -> None:
    """The last block is lower than the others, or as high."""
    fitting, held_out = gram(correlated(900, rows, 1)), gram(correlated(300, rows, 1)[:, :rows])
    factor = factorize(fitting, rows, LAMBDA)
    order = factor.order
    s = oracles.damped(fitting.double().numpy(), LAMBDA)[np.ix_(order.numpy(), order.numpy())]
    spread = np.zeros((rows, rows))  # column i: the errors of all rows after an error of 1 in row i, by solving
    blocks = row_blocks(rows)
    for part in blocks:
        for row in range(part.start, part.stop):
            error = np.zeros(rows)
            error[row] = 1
            rest = slice(part.stop, rows)
            if part.stop < rows:
                error[rest] = -np.linalg.solve(s[rest, rest], s[rest, : part.stop] @ error[: part.stop])
            spread[:, row] = error
    other = held_out.double().numpy()[np.ix_(order.numpy(), order.numpy())]
    expected = np.trace(spread.T @ other @ spread) / np.trace(other)
    found = predicted_ratios(fitting, held_out, (LAMBDA, 30.0))
    assert found == [pytest.approx(expected, rel=1e-3), pytest.approx(1, abs=0.05)]  # next to no feedback


def test_damping_is_chosen_and_hopeless_layers_go_without() -> None:
    near, far = gram(correlated(900, 40, 1)), gram(torch.randn(900, 40, generator=torch.Generator().manual_seed(0)))
    found = choose_moments(near, near, keep_held_out=True)
    assert found.ratio < 0.5 and found.damping == 0.03 and found.lower is not None and found.held_out is not None
    torch.testing.assert_close(unpack_lower(found.lower), 2 * near)
    assert torch.equal(unpack_lower(found.held_out), near)
    none = choose_moments(far, far.diagonal().diag(), keep_held_out=True)
    assert none.ratio > 0.97 and none.damping is none.lower is none.held_out is None
    assert row_feedback(none, torch.device("cpu")) is None
    assert choose_moments(near, torch.zeros_like(near), keep_held_out=False) == OutputMoments(1.0)
    assert math.isfinite(none.ratio)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_blocks_of_rows_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    task, statistics, _ = layer(100, 192)
    task = replace(task, weight=task.weight.cuda())
    factor = factorize(statistics.gram.cuda(), 2000, DAMPING)
    problem = prepare([task], factor, RoundingMethod(), statistics, [LayerSettings(0.0, 0.0)], UNRECORDED, False)
    feedback = row_feedback(moments_of(100), torch.device("cuda"))
    assert feedback is not None
    recorded = round_row_blocks(problem, 0.0, feedback)
    monkeypatch.setattr("hawqtool.rounding.output_feedback._can_be_recorded", lambda *_: False)
    plain = round_row_blocks(problem, 0.0, feedback)
    assert torch.equal(recorded.codes, plain.codes) and torch.equal(recorded.scales, plain.scales)
