"""Products of float32 matrices on a GPU's tensor cores, which multiply in TF32: 11 significant bits, summed in float32.

A number is the sum of its nearest TF32 number, its high part, and of the rest, its low part. Three products of parts,
high·high + high·low + low·high, come as close to float32's as is needed here (Markidis et al. 2018, 1803.04014), and
tensor cores make them in less than half the time of one product in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

SPAN = 512
"""Columns whose errors reach what lies behind them together. Every update reads and writes all of the feedback that it
changes: by blocks of 128 columns that takes as long as the products, by spans of 512 a quarter of it.
"""

LEAST_WEIGHTS = 32 << 20
"""Weights from which a column loop is worth it.

Milliseconds of a loop on an H200, in float32 and by parts: 28,672 rows of 4096 columns 23.8, 17.9; 20,480 18.9, 14.9;
4096 rows of 14,336 columns 32.3, 21.1; but 256 of these 5.6, 5.4, 1024 of 4096 columns 4.1, 5.5, 49,152 of 576 columns
2.8, 2.9.
"""

_FIRST_BITS, _HALF = -(1 << 13), 1 << 12
"""Sign, exponent and the first 10 bits of the fraction of a float32 number, what TF32 has; half of its last bit."""


@contextmanager
def coarse_products() -> Iterator[None]:
    """While the context lasts, a GPU's tensor cores may multiply float32 matrices in TF32, of 11 significant bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def split_in_two(values: Tensor) -> tuple[Tensor, Tensor]:
    """High and low part of float32 values, whose sum they are exactly; the low one is at most 2⁻¹¹ of the value.

    What TF32 loses of the low part, and the product of two low parts, which is left out, are less than 2⁻²⁰ of the
    product of the values, 2⁻²¹ where the hardware rounds to nearest.
    """
    bits = values.contiguous().view(torch.int32)
    high = (bits + _HALF).bitwise_and_(_FIRST_BITS).view(torch.float32)
    return high, values - high


def stacked_parts(upper: Tensor, size: int) -> Tensor:
    """Lines of U ``[n, m]`` for products with errors whose parts are stacked: ``[3 n, m]``.

    For each block of ``size`` lines these are its high, low and high parts; a kernel's ``write_parts`` stacks the high,
    high and low parts of the errors. So one product over a three times longer inner axis is the sum of three. That axis
    is contiguous, which a GPU multiplies in three quarters of the time (28,672 rows, spans of 512, on an H200).
    """
    pairs = zip(*(part.split(size, 1) for part in split_in_two(upper.t())), strict=True)
    return torch.cat([part for high, low in pairs for part in (high, low, high)], 1).t()


class LaterColumns:
    """What the errors of a block of columns do to the columns still to come: c_k -= e_j U_jk.

    With ``write_parts`` the products are those of parts, on tensor cores, and nested: a block of columns reaches the
    rest of its span, a span all that lies behind it.

    Args:
        feedback: ``[in, rows]`` float32 (float64 too without parts), c of all columns in visiting order; changed.
        write_parts: Writes the parts of errors ``[width, rows]`` to ``[3 width, rows]`` (see `stacked_parts`); None for
            products of the tensors' own dtype.
    """

    def __init__(self, feedback: Tensor, write_parts: Callable[[Tensor, Tensor], None] | None = None) -> None:
        self._feedback, self._write_parts, self._done = feedback, write_parts, 0
        columns, rows = feedback.shape
        self._parts = feedback.new_empty(3 * min(SPAN, columns) if write_parts else 0, rows)

    def products(self) -> AbstractContextManager[None]:
        """What has to last while columns are updated."""
        return coarse_products() if self._write_parts else nullcontext()

    def update(self, later: Tensor, errors: Tensor) -> None:
        """Take in the errors of the next block of columns.

        Args:
            later: U of these columns over later ones, ``[width, m]``; with parts ``[3 n, m]``, where n columns up to
                the last of these wait for the update (see `Factor.steps` and `Factor.steps_of_parts`).
            errors: ``[width, rows]``, e_j.
        """
        self._done += len(errors)
        if not later.shape[1]:
            return
        reached = self._feedback[self._done : self._done + later.shape[1]]
        if self._write_parts is not None:
            filled = 3 * ((self._done - 1) % SPAN + 1)
            self._write_parts(errors, self._parts[filled - 3 * len(errors) : filled])
            errors = self._parts[filled - len(later) : filled]
        reached.addmm_(later.t(), errors, alpha=-1.0)
