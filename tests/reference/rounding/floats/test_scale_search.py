"""Scales of float grids against a search over everything that can be stored, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hawqtool.formats import parse_label
from hawqtool.rounding.floats.elements import ELEMENTS, Element
from hawqtool.rounding.floats.scale_search import common_divisor, search_float_scales


def errors(weight: Tensor, scale: Tensor, costs: Tensor, element: Element) -> Tensor:
    """Weighted squared error of every group, ``[groups]`` float64, by comparing with all values of the codebook."""
    values = element.values().double()
    scaled = weight / scale[:, None]
    place = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
    nearest = torch.where(scaled - values[place - 1] < values[place] - scaled, values[place - 1], values[place])
    return ((nearest * scale[:, None] - weight).square() * costs).sum(-1)


@pytest.mark.parametrize(("label", "slack"), [("nvfp4", 1.0001), ("mxfp4", 1.0001), ("mxfp8", 1.0001), ("fp8", 1.1)])
def test_the_scale_is_the_best_that_can_be_stored(label: str, slack: float) -> None:
    generator = torch.Generator().manual_seed(3)
    fmt, width = parse_label(label), parse_label(label).group_size or 512
    weight = torch.randn(640 // width * 4 if width < 512 else 4, width, generator=generator).bfloat16().float() * 0.03
    weight[0] = 0
    costs = torch.rand(width, generator=generator) + 0.1
    divisor = common_divisor([weight]) if label == "nvfp4" else None
    found = search_float_scales(weight, costs, fmt, torch.bfloat16, divisor).double()[:, 0]
    assert fmt.floats is not None
    element = ELEMENTS[fmt.floats.element]
    if divisor is not None:
        storable = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / divisor
        assert bool(torch.isin(found[1:], storable).all())
    elif fmt.floats.scale == "e8m0":
        storable = torch.exp2(torch.arange(-24.0, 4).double())
        assert bool(torch.isin(found[1:], storable).all())
    else:
        storable = torch.exp2(torch.linspace(-13, -11, 40).double()).bfloat16().double()
    tried = torch.stack([errors(weight.double(), s.expand(len(weight)), costs.double(), element) for s in storable])
    own = errors(weight.double(), found, costs.double(), element)
    assert float(own.sum()) <= slack * float(tried.amin(0).sum())
    assert float(own[0]) == 0


def test_scales_of_blocks_are_shared_and_no_worse_than_the_largest_weight() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, fmt = torch.randn(256, 256, generator=generator), parse_label("fp8b128")
    scales = search_float_scales(weight, torch.ones(256), fmt, torch.float32)
    blocks = scales.view(2, 128, 2)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    peaks = weight.view(2, 128, 2, 128).abs().amax((1, 3)) / 448
    element = ELEMENTS["e4m3"]
    for row, column in ((0, 0), (1, 1)):
        block = weight[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128].reshape(1, -1).double()
        costs = torch.ones(block.shape[1]).double()
        searched = errors(block, blocks[row, 0, column][None].double(), costs, element)
        assert float(searched) <= float(errors(block, peaks[row, column][None].double(), costs, element)) * 1.0001


def test_the_divisor_is_a_power_of_two_with_room_for_the_largest_scale() -> None:
    for peak in (1e-6, 0.05, 1.0, 300.0):
        divisor = common_divisor([torch.tensor([[peak / 2]]), torch.tensor([[-peak]])])
        assert divisor == 2.0 ** round(torch.tensor(divisor).log2().item())
        assert 448 / 4 < peak / 6 * divisor * 2 <= 448
