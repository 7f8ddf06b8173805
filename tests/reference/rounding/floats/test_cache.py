"""Rounding of cached keys and values against all values of E4M3, and its scale against a sweep of scales."""

from __future__ import annotations

import torch
from torch import Tensor

from hawqtool.formats.cache import cache_scale
from hawqtool.rounding.floats.cache import round_cached


def nearest(numbers: Tensor) -> Tensor:
    """The nearest of the 253 numbers of E4M3, the even one of two, beyond the largest the largest; float64."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    distances = (numbers.double().abs().unsqueeze(-1) - codes).abs()
    odd = torch.arange(127) % 2
    best = (distances == distances.amin(-1, keepdim=True)).double() * (2 - odd)
    return torch.copysign(codes[best.argmax(-1)], numbers.double())


def test_states_become_the_nearest_values_and_are_cut() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 3, 40, 16, generator=generator) * torch.logspace(-4, 2.8, 16)
    states[0, 0, 0, 0], states[0, 0, 0, 1] = 9e3, 17.0  # beyond the largest, and between 16 and 18
    scales = torch.tensor([0.25, 1.0, 8.0]).view(3, 1, 1)
    expected = nearest(states.double() / scales) * scales
    assert torch.equal(round_cached(states, scales).double(), expected)
    assert torch.equal(round_cached(states).double(), nearest(states))
    assert round_cached(states.bfloat16(), scales).dtype == torch.bfloat16
    followed = states.clone().requires_grad_()
    (3 * round_cached(followed, scales)).sum().backward()
    assert torch.equal(round_cached(followed, scales).detach().double(), expected)
    assert followed.grad is not None and bool((followed.grad == 3).all())


def test_no_other_scale_is_much_better() -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(1, 1, 64, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
    peak = float(states.abs().max())

    def error(scale: float) -> float:
        return float((nearest(states / scale) * scale - states).square().sum())

    chosen = error(cache_scale(peak))
    assert chosen < 1.1 * min(error(peak / 448 * 2 ** (step / 8)) for step in range(0, 25, 4))
