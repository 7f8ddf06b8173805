"""Small floats that codes may be: E4M3 of 8 bits and E2M1 of 4 bits (OCP Microscaling Formats 1.0, section 5.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CODE_DTYPE = torch.float8_e4m3fn
"""dtype of codes in memory: it holds every value of E2M1 as well, so that a code is its own value."""


@dataclass(frozen=True)
class Element:
    """A small float without infinities, symmetric around zero.

    Args:
        name: Its name.
        mantissa_bits: Bits of the mantissa.
        least_exponent: Exponent of the smallest normal value; those below it are evenly spaced.
        largest: Largest value.
    """

    name: str
    mantissa_bits: int
    least_exponent: int
    largest: float

    def values(self) -> Tensor:
        """The codebook: every value once, rising, ``[codes]`` float32."""
        positive = [0.0]
        while positive[-1] < self.largest:
            positive.append(positive[-1] + float(self.spacing(torch.tensor(positive[-1], dtype=torch.float32))))
        return torch.tensor([-v for v in reversed(positive[1:])] + positive, dtype=torch.float32)

    def spacing(self, magnitudes: Tensor) -> Tensor:
        """Distance of neighbouring values around magnitudes, float32 of their shape."""
        exponents = torch.frexp(magnitudes.float())[1].sub_(1).clamp_min_(self.least_exponent)
        exponents = torch.where(magnitudes > 0, exponents, self.least_exponent)
        return torch.ldexp(torch.ones_like(magnitudes, dtype=torch.float32), exponents - self.mantissa_bits)

    def nearest_(self, scaled: Tensor) -> Tensor:
        """Replace numbers by the nearest values, half to even, beyond the largest by the largest.

        Args:
            scaled: Weights over their scales, float32 or float64; changed.
        """
        scaled.clamp_(-self.largest, self.largest)
        if self.name == "e4m3":
            return scaled.copy_(scaled.to(CODE_DTYPE))
        magnitudes = scaled.abs()
        # Values of E2M1 are half-integers below 2, integers below 4, even above.
        fine, middle = (magnitudes * 2).round_().mul_(0.5), magnitudes.round()
        coarse = (magnitudes * 0.5).round_().mul_(2)
        found = torch.where(magnitudes < 2, fine, torch.where(magnitudes < 4, middle, coarse))
        return scaled.copy_(torch.copysign(found, scaled))

    def neighbours(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The next lower and the next higher value of codes, float32; at the ends of the range the code itself."""
        values = self.values().to(codes.device)
        place = torch.searchsorted(values, codes.float())
        return values[(place - 1).clamp_min(0)], values[(place + 1).clamp_max(len(values) - 1)]

    def beyond(self, codes: Tensor, scaled: Tensor) -> Tensor:
        """Which numbers lie more than half a step outside the range, bool.

        Args:
            codes: Their codes, as float32.
            scaled: The numbers, over their scales.
        """
        edge = self.largest + float(self.spacing(torch.tensor(self.largest, dtype=torch.float32))) / 2
        return (codes.abs() == self.largest) & (scaled.abs() > edge)


E4M3 = Element("e4m3", 3, -6, 448.0)
E2M1 = Element("e2m1", 1, 0, 6.0)
ELEMENTS = {element.name: element for element in (E4M3, E2M1)}
