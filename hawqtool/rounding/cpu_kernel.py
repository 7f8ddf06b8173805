"""The column loop of one block and the scale search in compiled code, for CPUs, where torch's small operations wait."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

BLOCK_COLUMNS = 128
"""Columns of a block: fewer wake the other threads more often, more take longer in their own updates."""

_TILE_ROWS = 64
"""Rows that go through all columns, or candidates, together: what they need stays in the nearest cache."""

_ROUND = np.float32(12582912.0)
"""1.5 · 2^23: a sum with it has no bits below one, so it rounds half to even."""


def round_block(
    target: Tensor,
    drift: Tensor,
    steps: Tensor,
    zeros: Tensor | None,
    upper: Tensor,
    lowest: Tensor,
    highest: Tensor,
    codes: Tensor,
    errors: Tensor,
    beta: float,
) -> None:
    """Round the columns of one block; arguments as for `column_kernel.round_block`, of any width."""
    columns = [tensor.numpy() for tensor in (target, drift, steps, target if zeros is None else zeros)]
    shared = [tensor.contiguous().numpy() for tensor in (upper, lowest, highest)]
    shared += [codes.numpy(), errors.numpy()]
    keep, keep_squared = np.float32(1 - beta), np.float32((1 - beta) ** 2)
    _by_rows(len(lowest), lambda *rows: _round_columns(*columns, zeros is not None, *shared, keep, keep_squared, *rows))


def candidate_errors(
    weight: Tensor, importance: Tensor, steps: Tensor, zeros: Tensor, lowest: float, highest: float
) -> Tensor:
    """Sum over each group of c (w - s (q - z))²; arguments and result as for `search_kernel.candidate_errors`."""
    errors = weight.new_empty(len(steps) * len(zeros), *weight.shape[:2])
    values = [tensor.contiguous().numpy() for tensor in (weight, importance, steps, zeros, errors)]
    low, high = np.float32(lowest), np.float32(highest)
    _by_rows(weight.shape[1], lambda *rows: _try_candidates(*values, low, high, *rows))
    return errors


def _by_rows(count: int, work: Callable[[int, int], None]) -> None:
    """Share rows among as many threads as torch uses; the result does not depend on their number."""
    threads = min(torch.get_num_threads(), -(-count // _TILE_ROWS))
    if threads == 1:
        work(0, count)
        return
    tiles = -(-count // _TILE_ROWS)
    bounds = [min(count, tiles * number // threads * _TILE_ROWS) for number in range(threads + 1)]
    others = [_pool(threads).submit(work, *part) for part in zip(bounds[1:-1], bounds[2:], strict=True)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "rounding")


def _compiled(function: Callable[..., None]) -> Any:
    """Compiled at the first call; kept on disk where a folder for it can be written."""
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # no such folder
        return numba.njit(**settings)(function)


@_compiled
def _add_squares(total, values, inverse, costs, zero, lowest, highest, rows):  # type: ignore[no-untyped-def]
    """Add c (w / s - q + z)² of all columns to the total of every row, four columns at a time."""
    i, width = 0, len(values)
    while i + 4 <= width:
        e, f, g, h = costs[i], costs[i + 1], costs[i + 2], costs[i + 3]
        u, v, w, x = values[i], values[i + 1], values[i + 2], values[i + 3]
        for r in range(rows):
            low, high, scale = lowest - zero[r], highest - zero[r], inverse[r]
            part = total[r] + e * _squared(u[r] * scale, low, high) + f * _squared(v[r] * scale, low, high)
            total[r] = part + g * _squared(w[r] * scale, low, high) + h * _squared(x[r] * scale, low, high)
        i += 4
    while i < width:
        cost, value = costs[i], values[i]
        for r in range(rows):
            total[r] += cost * _squared(value[r] * inverse[r], lowest - zero[r], highest - zero[r])
        i += 1


@_compiled
def _squared(scaled, low, high):  # type: ignore[no-untyped-def]
    """Squared distance of a value to the nearest code, both in steps."""
    difference = (min(max(scaled, low), high) + _ROUND) - _ROUND - scaled
    return difference * difference


@_compiled
def _round_columns(  # type: ignore[no-untyped-def]
    target, drift, steps, zeros, has_zeros, upper, lowest, highest, codes, errors, keep, keep_squared, begin, end
):
    """Rows from ``begin`` to ``end`` through all columns of a block."""
    width = len(target)
    drifts, error = np.empty((width, _TILE_ROWS), np.float32), np.empty(_TILE_ROWS, np.float32)
    for first in range(begin, end, _TILE_ROWS):
        rows = min(_TILE_ROWS, end - first)
        # Slices, whose loops run over plain numbers from zero, so that they are made for several numbers at once.
        low, high = lowest[first : first + rows], highest[first : first + rows]
        drifts[:, :rows] = drift[:, first : first + rows]
        for j in range(width):
            value, step = target[j, first : first + rows], steps[j, first : first + rows]
            zero, moved = zeros[j, first : first + rows], drifts[j]
            code, out = codes[j, first : first + rows], errors[j, first : first + rows]
            pivot = upper[j, j]
            for r in range(rows):
                shift = zero[r] if has_zeros else np.float32(0)
                level = (value[r] + keep * moved[r]) / step[r]
                level = (min(max(level, low[r] - shift), high[r] - shift) + _ROUND) - _ROUND
                error[r] = (value[r] + keep_squared * moved[r] - level * step[r]) / pivot
                out[r] = error[r]
                code[r] = np.int8(level + shift)
            for k in range(j + 1, width):
                feedback, later = upper[j, k], drifts[k]
                for r in range(rows):
                    later[r] -= feedback * error[r]


@_compiled
def _try_candidates(  # type: ignore[no-untyped-def]
    weight, importance, steps, zeros, errors, lowest, highest, begin, end
):
    """Rows from ``begin`` to ``end`` of every group against every candidate."""
    groups, _, width = weight.shape
    values = np.empty((width, _TILE_ROWS), np.float32)
    total, inverse = np.empty(_TILE_ROWS, np.float32), np.empty(_TILE_ROWS, np.float32)
    for group in range(groups):
        for first in range(begin, end, _TILE_ROWS):
            rows = min(_TILE_ROWS, end - first)
            values[:, :rows] = weight[group, first : first + rows].T
            for candidate in range(len(steps)):
                step = steps[candidate, group, first : first + rows]
                for r in range(rows):
                    inverse[r] = np.float32(1) / step[r]
                for index in range(len(zeros)):
                    zero = zeros[index, group, first : first + rows]
                    out = errors[candidate * len(zeros) + index, group, first : first + rows]
                    total[:] = np.float32(0)
                    _add_squares(total, values, inverse, importance[group], zero, lowest, highest, rows)
                    for r in range(rows):
                        out[r] = total[r] * step[r] * step[r]
