"""Loops over few rows are recorded as a GPU's graph once it pays, and give the codes of loops that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hawqtool.rounding import gptq
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.floats.elements import CODE_DTYPE, ELEMENTS
from hawqtool.rounding.gptq import RowGrids, round_compensated
from hawqtool.rounding.kernels import recorded_loop

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def factor_on(device: str) -> Any:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(device)
    return factorize(x.t() @ x / 64, 64, 0.1)


def test_the_third_loop_of_a_form_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, bool]] = []

    class Recorded(recorded_loop.RecordedLoop):
        def __init__(self, _steps: Any, target: Any, has_zeros: bool, *_: Any) -> None:
            made.append((target.shape[1], has_zeros))

    monkeypatch.setattr(gptq, "RecordedLoop", Recorded)
    factor, few, many = factor_on("cpu"), torch.zeros(256, 4), torch.zeros(256, recorded_loop.MOST_ROWS + 1)
    found = [gptq._recorded(factor, few, False, 0.0, 128, lambda *_: None) for _ in range(4)]
    assert found[:2] == [None, None] and found[2] is found[3] is not None
    assert [gptq._recorded(factor, many, False, 0.0, 128, lambda *_: None) for _ in range(4)] == [None] * 4
    for kind in (True, "e2m1"):  # other forms: zero points, floats
        assert gptq._recorded(factor, few, kind, 0.0, 128, lambda *_: None) is None
    assert made == [(4, False)]


@NEEDS_GPU
def test_codes_of_floats_are_floats() -> None:
    factor = factor_on("cuda")
    found = []
    for columns in (factor, factor, factor, factor, factor_on("cuda")):  # the third one is recorded
        weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)).cuda()
        grids = RowGrids(torch.full((32, 8), 0.3).cuda(), *(torch.zeros(32).cuda(),) * 2, element=ELEMENTS["e2m1"])
        found.append(round_compensated(weight, grids, columns))
    assert all(codes.dtype == CODE_DTYPE and torch.equal(codes.float(), found[-1].float()) for codes in found)


@NEEDS_GPU
@pytest.mark.parametrize("has_zeros", [False, True])
def test_codes_and_errors_are_equal(has_zeros: bool) -> None:
    factor = factor_on("cuda")
    for seed in range(5):  # the first ones are not recorded
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(32, 256, generator=generator).cuda()
        scales = torch.rand(32, 8, generator=generator).cuda() / 4 + 0.1
        zeros = torch.randint(-2, 3, (32, 8), generator=generator).float().cuda() if has_zeros else None
        grids = RowGrids(scales, torch.full((32,), -8.0).cuda(), torch.full((32,), 7.0).cuda(), zeros)
        errors, expected_errors = torch.empty(256, 32).cuda(), torch.empty(256, 32).cuda()
        codes = round_compensated(weight, grids, factor, column_errors=errors)
        expected = round_compensated(weight, grids, factor_on("cuda"), column_errors=expected_errors)
        assert torch.equal(codes, expected) and torch.equal(errors, expected_errors)
