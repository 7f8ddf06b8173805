"""What learning may move: offsets stay within reach of their start and within the grid, and so do the codes."""

from __future__ import annotations

import pytest
import torch

from hawqtool.formats import QuantFormat
from hawqtool.rounding.grid import Quantized, nearest_codes
from hawqtool.rounding.learned.fake_quant import EDGE, FlatLayers
from hawqtool.rounding.spec import InitialRounding


@pytest.mark.parametrize("push", [-9.0, 9.0])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_offsets_stay_at_the_border(bits: int, push: float) -> None:
    fmt, scales = QuantFormat(bits, 4), torch.full((2, 1), 0.5)
    levels = torch.tensor([[fmt.min_code, fmt.min_code + 1, 0, 1], [fmt.max_code, fmt.max_code - 1, 0, -1]])
    weight = levels * 0.5
    codes = nearest_codes(weight, scales, fmt)
    flat = FlatLayers([InitialRounding("layer", weight, Quantized(codes, scales, None), fmt)], reach=1.0)
    flat.latent.add_(push)
    flat.confine()
    # By one code at most, and half a code beyond the last one, from where one step leads back.
    expected = (levels.float() + (1 if push > 0 else -1)).clamp(fmt.min_code - EDGE, fmt.max_code + EDGE)
    torch.testing.assert_close(flat.latent.view(2, 4), expected)
    assert torch.equal(flat.rounded()["layer"].codes.float(), expected.round().clamp(fmt.min_code, fmt.max_code))
