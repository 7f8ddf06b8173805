"""The sums of a rotation in compiled code, a few rows at a time in the nearest cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_TILE = 8
"""Rows that are turned together, side by side, so that all additions run over plain numbers from zero."""


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiles at the first call, with no liberty in sums; kept on disk where a folder for it can be written."""
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # no such folder
        return numba.njit(**settings)(function)


@_compiled
def turn(rows, power, waves):  # type: ignore[no-untyped-def]
    """Multiply rows by ``M x H`` in place, as `hawqtool.checkpoint.rotated.hadamard.Rotation` has it.

    Butterflies over H's order of 2^k, then weighted sums over M's order m; one rounding per addition and product, in
    one order, so that the result does not depend on the machine.

    Args:
        rows: ``[n, m * power]`` float64, contiguous.
        power: Order of H.
        waves: ``[2, (m - 1) / 2, (m - 1) / 2]`` float64 over sqrt(m): cosines of terms k, like those of m - k, and
            sines, which are opposite.
    """
    count, size = rows.shape
    half = waves.shape[1]
    tile, sums, norm = np.empty((size, _TILE)), np.empty((2 * half + 3, _TILE)), 1 / np.sqrt(float(power))
    for first in range(0, count, _TILE):
        width = min(_TILE, count - first)
        for i in range(size):
            for r in range(width):
                tile[i, r] = rows[first + r, i]
        step = 1
        while step < power:
            for start in range(0, size, 2 * step):
                for i in range(start, start + step):
                    low, high = tile[i], tile[i + step]
                    for r in range(_TILE):
                        a, b = low[r], high[r]
                        low[r], high[r] = a + b, a - b
            step *= 2
        for i in range(size):
            for r in range(_TILE):
                tile[i, r] *= norm
        if half:
            for place in range(power):
                _mix(tile, place, power, waves, sums)
        for i in range(size):
            for r in range(width):
                rows[first + r, i] = tile[i, r]


@_compiled
def _mix(tile, place, power, waves, sums):  # type: ignore[no-untyped-def]
    """M over the m terms that begin at one place, ``power`` apart; ``sums`` holds what lies between."""
    half = waves.shape[1]
    last, unit = 2 * half, 1 / np.sqrt(float(2 * half + 1))
    even, odd = sums[:half], sums[half:last]
    total, same, opposite = sums[last], sums[last + 1], sums[last + 2]
    for r in range(_TILE):
        total[r] = tile[place, r]
    for k in range(half):
        low, high = tile[place + (k + 1) * power], tile[place + (last - k) * power]
        for r in range(_TILE):
            even[k, r], odd[k, r] = low[r] + high[r], low[r] - high[r]
        for r in range(_TILE):
            total[r] += even[k, r]
    for i in range(half):
        for r in range(_TILE):
            same[r], opposite[r] = tile[place, r] * unit, 0.0
        for k in range(half):
            c, s = waves[0, k, i], waves[1, k, i]
            for r in range(_TILE):
                same[r] += even[k, r] * c
                opposite[r] += odd[k, r] * s
        for r in range(_TILE):
            tile[place + (i + 1) * power, r] = same[r] + opposite[r]
            tile[place + (last - i) * power, r] = same[r] - opposite[r]
    for r in range(_TILE):
        tile[place, r] = total[r] * unit
