"""Data sheets of cards, and the arithmetic in which their kernels multiply each format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Arithmetic = Literal["16 bit", "int8", "fp8", "fp4"]
"""What a kernel multiplies: weights that are unpacked and inputs as they are, or both factors in few bits."""


@dataclass(frozen=True)
class Hardware:
    """What one card of an architecture can do at most.

    Args:
        card: The card whose data sheet has the figures.
        bandwidth: Bytes per second that its memory gives.
        rates: Dense operations per second, two for each product, by arithmetic.
        multiplies: Labels of the formats that run in fewer than 16 bits; None for those that do not run at all.
    """

    card: str
    bandwidth: float
    rates: Mapping[Arithmetic, float]
    multiplies: Mapping[str, Arithmetic | None]

    def rate(self, label: str) -> float | None:
        """Operations per second of the kernel that runs a format; None where there is none."""
        arithmetic = self.multiplies.get(label, "16 bit")
        return None if arithmetic is None else self.rates[arithmetic]


_FP8: Mapping[str, Arithmetic | None] = {"fp8-a8f": "fp8", "fp8b128-a8f": "fp8"}
_INT8: Mapping[str, Arithmetic | None] = {"w8ch-a8i": "int8"}
_MX: Mapping[str, Arithmetic | None] = {"mxfp4": "fp4", "mxfp4-a4": "fp4", "mxfp8": "fp8", "mxfp8-a8": "fp8"}
_ON_HOPPER_ALONE: Mapping[str, Arithmetic | None] = {"w4g128-a8f": None}

HARDWARE: Mapping[str, Hardware] = {
    "ampere": Hardware("A100 SXM 80 GB", 2.039e12, {"16 bit": 312e12, "int8": 624e12}, {**_INT8, **_ON_HOPPER_ALONE}),
    "ada": Hardware(
        "L40S",
        0.864e12,
        {"16 bit": 362e12, "int8": 733e12, "fp8": 733e12},
        {**_INT8, **_FP8, **_ON_HOPPER_ALONE},
    ),
    "hopper": Hardware(
        "H100 SXM",
        3.35e12,
        {"16 bit": 989e12, "int8": 1979e12, "fp8": 1979e12},
        {**_INT8, **_FP8, "w4g128-a8f": "fp8"},
    ),
    "blackwell": Hardware(
        "B200",
        8.0e12,
        {"16 bit": 2250e12, "fp8": 4500e12, "fp4": 9000e12},
        {**_FP8, **_MX, "nvfp4-a4": "fp4", "w8ch-a8i": None, **_ON_HOPPER_ALONE},
    ),
}
"""By architecture: data sheets of NVIDIA, without sparsity; kernels by the source of vLLM 0.33.

All other formats are weights alone: kernels unpack them and multiply in 16 bits. Before Blackwell that is true of
``nvfp4`` and MX with rounded inputs as well, and on Ampere of FP8.
"""
