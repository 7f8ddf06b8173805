"""What is compiled ahead for a CPU is what rounding calls."""

from __future__ import annotations

import pytest
import torch

from hawqtool.formats import QuantFormat
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.layer import round_group
from hawqtool.rounding.method import RoundingMethod, Task

numba_cpu = pytest.importorskip("hawqtool.rounding.kernels.numba_cpu")

COMPILED = ("_round_columns", "_try_candidates")


def signatures() -> dict[str, list[object]]:
    return {name: list(getattr(numba_cpu, name).signatures) for name in COMPILED}


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_compiles_nothing_more(symmetric: bool) -> None:
    numba_cpu.compile_ahead()
    ahead = signatures()
    assert all(ahead.values())
    inputs = torch.randn(512, 160, generator=torch.Generator().manual_seed(0))
    factor = factorize(inputs.t() @ inputs / 512, 512)
    weight = torch.randn(300, 160, generator=torch.Generator().manual_seed(1))
    task = Task("layer", weight, QuantFormat(3, 32, symmetric=symmetric), torch.bfloat16)
    round_group([task], factor, RoundingMethod("gptq"))
    assert signatures() == ahead
