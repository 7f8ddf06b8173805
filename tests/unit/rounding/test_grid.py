"""What the scale search tries together, which is what kernels are compiled for ahead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.rounding import grid
from hawqtool.rounding.grid import search_grid, searches


@pytest.mark.parametrize(("symmetric", "both_signs"), [(True, True), (True, False), (False, False)])
def test_searches_try_so_many_together(monkeypatch: pytest.MonkeyPatch, symmetric: bool, both_signs: bool) -> None:
    tried: list[tuple[int, int]] = []

    def least_errors(weight: Tensor, _importance: Tensor, steps: Tensor, zeros: Tensor, *_: Any) -> Any:
        tried.append((len(steps), len(zeros)))
        return torch.zeros(weight.shape[:2]), torch.zeros(weight.shape[:2], dtype=torch.long)

    monkeypatch.setattr(grid, "scale_search", lambda _: SimpleNamespace(least_errors=least_errors))
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    search_grid(weight, torch.ones(64), QuantFormat(4, 32, symmetric), torch.bfloat16, both_signs)
    assert tuple(tried) == searches(symmetric, both_signs)
