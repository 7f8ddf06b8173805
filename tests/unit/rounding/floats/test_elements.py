"""Values of small floats, rounding to them, neighbours."""

from __future__ import annotations

import torch

from hawqtool.rounding.floats.elements import E2M1, E4M3


def test_codebooks_are_those_of_the_formats() -> None:
    assert E2M1.values()[7:].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    bits = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 127 is NaN
    assert torch.equal(E4M3.values(), torch.cat([-bits.flip(0)[:-1], bits]))


def test_rounding_takes_the_nearest_value_and_ties_the_even_code() -> None:
    generator = torch.Generator().manual_seed(0)
    for element in (E2M1, E4M3):
        values, numbers = element.values().double(), torch.randn(4000, generator=generator).double() * 4
        best = values[(numbers[:, None] - values).abs().argmin(1)]
        assert torch.equal(element.nearest_(numbers.clone()), best)
        middles, positive = (values[1:] + values[:-1]) / 2, (len(values) - 1) // 2
        found = torch.searchsorted(values, element.nearest_(middles.clone()))
        assert bool(((found - positive) % 2 == 0).all())
        assert element.nearest_(torch.tensor([1e9, -1e9])).tolist() == [element.largest, -element.largest]


def test_neighbours_are_one_value_away_and_stay_inside() -> None:
    for element in (E2M1, E4M3):
        values = element.values()
        lower, higher = element.neighbours(values.to(torch.float8_e4m3fn))
        assert torch.equal(lower[1:], values[:-1]) and torch.equal(higher[:-1], values[1:])
        assert float(lower[0]) == -element.largest and float(higher[-1]) == element.largest
