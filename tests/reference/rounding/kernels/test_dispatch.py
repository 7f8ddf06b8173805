"""The compiled kernels against the eager code: Numba's, and Triton's in its interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockGrid
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES
from hawqtool.errors import UsageError
from hawqtool.formats import QuantFormat
from hawqtool.rounding.blocks.block_loop import round_block_codes
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.floats.elements import ELEMENTS, Element
from hawqtool.rounding.gptq import RowGrids, round_compensated
from hawqtool.rounding.grid import dequantize, nearest_codes, search_grid
from hawqtool.rounding.kernels.dispatch import EAGER, VARIABLE, column_loop, kernel_for, scale_search


@pytest.fixture(params=["numba", "triton"])
def both_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Calls a function with the eager and with the compiled code."""
    kernel = request.param
    pytest.importorskip(kernel)
    if kernel == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter needs a machine without a GPU; check_kernels.py compares there")
    # Read when a module of kernels is imported, which happens at its first use.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if kernel == "triton":  # the interpreter takes a program of many rows as long as one of one
        from hawqtool.rounding.kernels import triton_columns

        monkeypatch.setattr(triton_columns, "_FEW_ROWS", ((0, 8),))

    def call(function):
        results = []
        for name in (EAGER, kernel):
            monkeypatch.setenv(VARIABLE, name)
            results.append(function())
        return results

    return call


def case(rows: int, columns: int, bits: int, asymmetric: bool) -> tuple[Factor, Tensor, RowGrids]:
    generator = torch.Generator().manual_seed(rows + columns + bits)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs[:, ::5] *= 3
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    step = weight.abs().amax(1, keepdim=True).expand(rows, columns) / 2 ** (bits - 1)
    zero = torch.randint(-2, 2, (rows, columns), generator=generator).float() if asymmetric else None
    lowest, highest = torch.full((rows,), -(2.0 ** (bits - 1))), torch.full((rows,), 2.0 ** (bits - 1) - 1)
    highest[::3] -= 1
    factor = factorize(inputs.t() @ inputs / len(inputs), len(inputs))
    return factor, weight, RowGrids(step, lowest, highest, zero)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rows", "columns", "bits"), [(13, 150, 2), (8, 128, 3), (21, 40, 4), (5, 300, 8), (150, 70, 3)]
)
def test_same_codes(both_kernels, rows: int, columns: int, bits: int, beta: float, asymmetric: bool) -> None:
    factor, weight, grids = case(rows, columns, bits, asymmetric)
    eager, fused = both_kernels(lambda: round_compensated(weight, grids, factor, beta, block_size=128))
    # Sums that lie on a tie up to float32 may round either way, and change the rest of their row.
    assert (eager != fused).float().mean() < 0.01
    assert fused.dtype == torch.int8 and fused.shape == weight.shape


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_same_codes_of_floats(both_kernels, element: Element) -> None:
    factor, weight, grids = case(40, 150, 4, False)
    weight[:, 3], weight[0] = 0.0, torch.linspace(-1.3, 1.3, 150)
    scales = weight.abs().amax(1, keepdim=True).expand_as(weight) / element.largest
    scales = torch.exp2(torch.log2(scales).round())  # some weights lie beyond the largest code, others on ties
    weight[1] = scales[1] * (element.values()[torch.arange(150) % len(element.values())] + 2.0**-10)
    floats = RowGrids(scales, grids.lowest, grids.highest, None, element)
    eager, fused = both_kernels(lambda: round_compensated(weight, floats, factor, 0.1, block_size=128))
    assert fused.dtype == eager.dtype == torch.float8_e4m3fn
    assert (eager.view(torch.int8) != fused.view(torch.int8)).float().mean() < 0.01


def test_same_codes_of_tables(both_kernels) -> None:
    kind = BLOCK_TYPES["IQ4_NL"]
    factor, weight, _ = case(40, 160, 4, False)
    steps = weight.view(40, -1, kind.group_size).abs().amax(-1) / 120 * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    steps[3, 1], weight[5] = 0.0, (steps[5, 0] * 0.5) * torch.arange(-80, 80)  # some on ties, some beyond both ends
    grid = BlockGrid(steps, None)
    eager, fused = both_kernels(lambda: round_block_codes(weight, grid, factor, kind))
    # Sums in another order: what lies on a tie up to float32 may round either way, and change the rest of its row.
    assert (eager != fused).float().mean() < 0.01
    assert fused.dtype == torch.int8 and bool((fused[3, kind.group_size : 2 * kind.group_size] == 8).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (192, 64), (300, 0), (40, 0)])
def test_same_scales(both_kernels, columns: int, group_size: int, symmetric: bool) -> None:
    factor, weight, _ = case(11, columns, 3, False)
    fmt = QuantFormat(3, group_size, symmetric)
    weight[0] = 0
    eager, fused = both_kernels(lambda: search_grid(weight, factor.diagonal, fmt, torch.bfloat16, symmetric))
    losses = [
        (dequantize(nearest_codes(weight, scales, fmt, zeros), scales, zeros).float() - weight)
        .square()
        .mul(factor.diagonal)
        .sum()
        for scales, zeros in (eager, fused)
    ]
    assert (eager[0] != fused[0]).float().mean() < 0.05
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


def test_choice_of_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    cpu = torch.device("cpu")
    assert kernel_for(cpu) == ("numba" if importlib.util.find_spec("numba") else EAGER)
    monkeypatch.setenv(VARIABLE, EAGER)
    assert kernel_for(cpu) == EAGER and column_loop(cpu) is None and scale_search(cpu) is None
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UsageError, match="eager, numba, triton"):
        kernel_for(cpu)
    monkeypatch.setenv(VARIABLE, "numba")
    with pytest.raises(UsageError, match="on a CPU only"):
        kernel_for(torch.device("cuda"))


def test_threads_share_the_rows_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv(VARIABLE, "numba")
    factor, weight, grids = case(333, 90, 3, True)
    fmt, threads = QuantFormat(3, 30, False), torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            codes = round_compensated(weight, grids, factor)
            found.append((codes, *search_grid(weight, factor.diagonal, fmt, torch.bfloat16, False)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
