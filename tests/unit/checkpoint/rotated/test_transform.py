"""The compiled sums of a rotation against those of torch's operations: the same bits."""

from __future__ import annotations

import pytest
import torch

from hawqtool.checkpoint.rotated.hadamard import Rotation


@pytest.mark.parametrize("size", [1, 2, 7, 12, 64, 576, 640])
@pytest.mark.parametrize("rows", [1, 8, 11])
def test_bits_do_not_depend_on_the_code(size: int, rows: int) -> None:
    rotation = Rotation(size, 3)
    x = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    kept = x.clone()
    assert torch.equal(
        rotation._orders(x), rotation.mix_columns(x.t().clone(memory_format=torch.contiguous_format)).t()
    )
    assert torch.equal(x, kept)
