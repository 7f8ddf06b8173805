"""The Triton column kernel against the eager loop, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a GPU is there: scripts/check_kernels.py compares the compiled kernels", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from hawqtool.rounding.compensate import round_compensated
from hawqtool.rounding.factor import Factor, factorize


def case(rows: int, columns: int, bits: int, asymmetric: bool) -> tuple[Factor, dict[str, torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(rows + columns + bits)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs[:, ::5] *= 3
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    step = weight.abs().amax(1, keepdim=True).expand(rows, columns) / 2 ** (bits - 1)
    zero = torch.randint(-2, 2, (rows, columns), generator=generator).float() if asymmetric else None
    limits = {
        "lowest": torch.full((rows,), -(2.0 ** (bits - 1))),
        "highest": torch.full((rows,), 2.0 ** (bits - 1) - 1),
    }
    limits["highest"][::3] -= 1
    factor = factorize(inputs.t() @ inputs / len(inputs), len(inputs))
    return factor, {"weight": weight, "step": step, "zero": zero, **limits}


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "columns", "bits"), [(13, 150, 2), (8, 128, 3), (21, 40, 4), (5, 300, 8)])
def test_same_codes_as_eager(rows: int, columns: int, bits: int, beta: float, asymmetric: bool) -> None:
    factor, arguments = case(rows, columns, bits, asymmetric)
    eager, fused = (
        round_compensated(**arguments, factor=factor, beta=beta, block_size=128, kernel=k) for k in ("eager", "triton")
    )
    # Sums that lie on a tie up to float32 may round either way, and change the rest of their row.
    assert (eager != fused).float().mean() < 0.01
    assert fused.dtype == torch.int8 and fused.shape == arguments["weight"].shape
