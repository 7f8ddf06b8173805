"""Products of parts, as tensor cores make them, against float64; the column loop with them against that without."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from hawqtool.rounding import gptq
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.gptq import RowGrids, round_compensated
from hawqtool.rounding.kernels import tensor_cores
from hawqtool.rounding.kernels.dispatch import EAGER, VARIABLE
from hawqtool.rounding.kernels.tensor_cores import LaterColumns, split_in_two, stacked_parts

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TRUNCATING = -(1 << 13)


def write_parts(errors: Tensor, parts: Tensor) -> None:
    """What kernels do, by torch's operations."""
    high, low = split_in_two(errors)
    torch.cat((high, high, low), out=parts)


def tf32(values: Tensor) -> Tensor:
    """Values as tensor cores take them that cut the last 13 bits off, in float64."""
    return (values.contiguous().view(torch.int32) & TRUNCATING).view(torch.float32).double()


def correlated(columns: int) -> Factor:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs = inputs + inputs[:, ::4].repeat_interleave(4, 1)[:, :columns]
    return factorize(inputs.t() @ inputs / len(inputs), len(inputs))


def layer(rows: int, columns: int, has_zeros: bool = False) -> tuple[Tensor, RowGrids]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    steps = weight.abs().amax(1, keepdim=True) / 4
    zeros = torch.randint(-2, 2, (rows, 1), generator=generator).float() if has_zeros else None
    return weight, RowGrids(steps, torch.full((rows,), -4.0), torch.full((rows,), 3.0), zeros)


def test_parts_are_exact_and_small() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1000)
    high, low = split_in_two(values)
    assert torch.equal(high.double() + low.double(), values.double())
    assert torch.equal(tf32(high), high.double())
    assert bool((low.abs() <= values.abs() * 2**-11).all())
    ends = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    assert torch.equal(sum(split_in_two(ends[:2])), ends[:2]) and not sum(split_in_two(ends[2:])).isfinite().any()


def test_one_product_of_stacked_parts_is_nearly_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    upper, errors = (torch.randn(300, 50, generator=generator) for _ in range(2))
    parts = torch.cat([torch.cat((high, high, low)) for high, low in map(split_in_two, errors.split(128))])
    found = tf32(stacked_parts(upper, 128)).t() @ tf32(parts)
    size = upper.double().abs().t() @ errors.double().abs()
    coarse = (tf32(upper).t() @ tf32(errors) - upper.double().t() @ errors.double()).abs() / size
    fine = (found - upper.double().t() @ errors.double()).abs() / size
    assert float(coarse.max()) > 2**-15 and float(fine.max()) < 2**-21


@pytest.mark.parametrize("columns", [128, 512, 1100, 1536])
def test_nested_updates_reach_what_single_ones_do(columns: int) -> None:
    factor = correlated(columns)
    errors = torch.randn(columns, 7, generator=torch.Generator().manual_seed(2))
    found, plain = torch.zeros(columns, 7), torch.zeros(columns, 7)
    nested, single = LaterColumns(found, write_parts), LaterColumns(plain)
    # What a block finds when it comes is that of all blocks before it.
    before = -(torch.triu(factor.upper.double(), 1).t() @ errors.double())
    for part, (corner, parts), (upper, later) in zip(
        errors.split(128), factor.steps_of_parts(128), factor.steps(128), strict=True
    ):
        assert torch.equal(corner, upper)
        nested.update(parts, part)
        single.update(later, part)
    own = torch.block_diag(*(torch.triu(upper, 1).double() for upper, _ in factor.steps(128)))
    expected = before + own.t() @ errors.double()
    for feedback in (found, plain):
        assert float((feedback - expected).abs().max()) < 1e-5 * float(expected.abs().max() + 1e-30)


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("paper_form", [False, True])
def test_codes_of_a_loop_with_parts(monkeypatch: pytest.MonkeyPatch, has_zeros: bool, paper_form: bool) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv(VARIABLE, "numba")
    factor, (weight, grids) = correlated(1100), layer(24, 1100, has_zeros)
    errors = torch.empty(1100, 24)
    loop = partial(round_compensated, weight, grids, factor, 0.1 if paper_form else 0.0, paper_form=paper_form)
    plain = loop()
    monkeypatch.setattr(gptq, "_parts_writer", lambda *_: write_parts)
    assert torch.equal(loop(), loop(column_errors=errors))
    # Sums in another order: what lies on a tie may round either way, and change the rest of its row.
    assert float((loop() != plain).float().mean()) < 0.01
    if not paper_form:
        assert torch.allclose(errors.square().sum(0), gptq.row_losses(weight, dequantized(loop(), grids), factor), 1e-3)


def dequantized(codes: Tensor, grids: RowGrids) -> Tensor:
    return grids.scales * (codes if grids.zeros is None else codes - grids.zeros)


def test_the_kernel_writes_the_same_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # its interpreter
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from hawqtool.rounding.kernels import triton_columns

    errors = torch.randn(37, 65, generator=torch.Generator().manual_seed(4)).to(device)
    found, expected = (torch.empty(111, 65, device=device) for _ in range(2))
    triton_columns.write_parts(errors, found)
    write_parts(errors, expected)
    assert torch.equal(found, expected)


@NEEDS_GPU
@pytest.mark.parametrize("rows", [256, 8192])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Few rows, of which the third loop is recorded, and many: codes that hardly differ, equal every time."""
    monkeypatch.delenv(VARIABLE, raising=False)
    weight, grids = layer(rows, 1536)
    weight, grids = weight.cuda(), RowGrids(grids.scales.cuda(), grids.lowest.cuda(), grids.highest.cuda())
    found = []
    for least in (1 << 62, 0):
        monkeypatch.setattr(tensor_cores, "LEAST_WEIGHTS", least)
        upper = correlated(1536)
        factor = Factor(
            upper.upper.cuda(), upper.pivots.cuda(), upper.order.cuda(), upper.diagonal.cuda(), 0.1, 0, 0, 1
        )
        errors = torch.empty(1536, rows).cuda()
        codes = [round_compensated(weight, grids, factor, column_errors=errors) for _ in range(4)]
        assert all(torch.equal(codes[0], other) for other in codes[1:])
        found.append((codes[0], errors.square().sum()))
    assert float((found[0][0] != found[1][0]).float().mean()) < 0.01
    assert float(found[1][1]) == pytest.approx(float(found[0][1]), rel=1e-4)


def test_few_weights_and_a_cpu_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, EAGER)
    monkeypatch.setattr(tensor_cores, "LEAST_WEIGHTS", 0)
    assert gptq._parts_writer(torch.zeros(4, 4), None) is None
