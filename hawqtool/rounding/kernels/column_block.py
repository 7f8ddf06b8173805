"""What the column loop of a block of columns works on, whichever kernel runs it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FloatCodes(NamedTuple):
    """Codes that are small floats, evenly spaced between powers of two, symmetric around zero.

    Args:
        mantissa_bits: Bits of the mantissa.
        least_exponent: Exponent of the smallest normal value.
        largest: Largest value.
    """

    mantissa_bits: int
    least_exponent: int
    largest: float


class ColumnBlock(NamedTuple):
    """Tensors of one block of columns, in visiting order; each column of the layer is a contiguous row here.

    Args:
        target: ``[width, rows]`` float32 (the eager loop takes float64 too), original weights.
        feedback: ``[width, rows]`` like the target, what earlier blocks left; changed.
        scales: ``[width, rows]`` like the target.
        zeros: ``[width, rows]`` like the target, integers; None for symmetric grids.
        upper: ``[width, width]`` float32, the block of U on its diagonal; any strides.
        lowest: ``[rows]`` like the target, smallest code of each row.
        highest: ``[rows]`` like the target, largest code of each row.
        codes: ``[width, rows]`` int8, written.
        errors: ``[width, rows]`` like the target, written: e_j, for the update of later blocks.
    """

    target: Tensor
    feedback: Tensor
    scales: Tensor
    zeros: Tensor | None
    upper: Tensor
    lowest: Tensor
    highest: Tensor
    codes: Tensor
    errors: Tensor
