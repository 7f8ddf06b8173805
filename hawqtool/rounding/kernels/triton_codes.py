"""Nearest codes in Triton: integers, and small floats with their bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_integer(level):  # type: ignore[no-untyped-def]
    """The nearest integer: adding 1.5 · 2^23 leaves no bits below one, so the sum rounds half to even.

    Bounds are integers, so that clipping before it changes nothing.
    """
    return (level + 12582912.0) - 12582912.0


@triton.jit
def nearest_float(  # type: ignore[no-untyped-def]
    level, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr
):
    """The nearest small float, half to even, and its bits as an E4M3 number, which all codes are in memory."""
    magnitude = tl.minimum(tl.abs(level), LARGEST)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, LEAST)
    # Powers of two by their bits: the spacing of values around the magnitude, and its inverse.
    spacing = ((exponent - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((MANTISSA - exponent + 127) << 23).to(tl.float32, bitcast=True)
    magnitude = nearest_integer(magnitude * inverse) * spacing
    bits = magnitude.to(tl.int32, bitcast=True)
    # E4M3 has a bias of 7 and three bits of mantissa; below 2^-6 its codes count steps of 2^-9.
    code = tl.where(magnitude < 0.015625, (magnitude * 512.0).to(tl.int32), (bits >> 20) - (120 << 3))
    negative = level.to(tl.int32, bitcast=True) < 0
    return tl.where(negative, -magnitude, magnitude), tl.where(negative, code | 128, code).to(tl.int8)
