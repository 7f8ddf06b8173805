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

from hawqtool.rounding.kernels.column_block import ColumnBlock

BLOCK_COLUMNS = 128
"""Columns of a block: fewer wake the other threads more often, more take longer in their own updates."""

_TILE_ROWS = 64
"""Rows that go through all candidates together: what they need stays in the nearest cache."""

_LOOP_ROWS = 384
"""Rows that go through all columns together: each of the many short loops over rows costs something by itself."""

_SHARED_ROWS = 256
"""Rows that are worth waking another thread for a block of columns."""

_TOGETHER = 8
"""Columns whose errors later ones get in one go: a third less time than one by one, which reads and writes more."""

_ROUND = np.float32(12582912.0)
"""1.5 · 2^23: a sum with it has no bits below one, so it rounds half to even."""


def round_block(block: ColumnBlock, beta: float) -> None:
    """Round the columns of one block of any width.

    Args:
        block: Its tensors.
        beta: FOEM's β.
    """
    target, zeros = block.target, block.zeros
    columns = [t.numpy() for t in (target, block.feedback, block.scales, target if zeros is None else zeros)]
    shared = [tensor.contiguous().numpy() for tensor in (block.upper, block.lowest, block.highest)]
    shared += [block.codes.numpy(), block.errors.numpy()]
    keeps = np.float32(1 - beta), np.float32((1 - beta) ** 2)
    _by_rows(
        len(block.lowest),
        _SHARED_ROWS,
        lambda *rows: _round_columns(*columns, zeros is not None, *shared, *keeps, *rows),
    )


def least_errors(
    weight: Tensor, importance: Tensor, steps: Tensor, zeros: Tensor, lowest: float, highest: float
) -> tuple[Tensor, Tensor]:
    """Least sum over a group of c (w - s (q - z))²; arguments and result as for `triton_scales.least_errors`."""
    error = weight.new_empty(weight.shape[:2])
    number = torch.empty(weight.shape[:2], dtype=torch.int64)
    values = [tensor.contiguous().numpy() for tensor in (weight, importance, steps, zeros, error, number)]
    low, high = np.float32(lowest), np.float32(highest)
    _by_rows(weight.shape[1], _TILE_ROWS, lambda *rows: _try_candidates(*values, low, high, *rows))
    return error, number


def compile_ahead() -> None:
    """Compile both, which takes a quarter of a minute where nothing is kept from an earlier time."""
    values = torch.ones(1, 1, 1)
    least_errors(values, values[0], values, values, 0.0, 1.0)
    column = values[0]
    codes = torch.zeros(1, 1, dtype=torch.int8)
    block = ColumnBlock(column, column.clone(), column, None, column, column[0], column[0], codes, column.clone())
    round_block(block, 0.0)


def _by_rows(count: int, tile: int, work: Callable[[int, int], None]) -> None:
    """Share tiles of rows among as many threads as torch uses; the result does not depend on their number."""
    tiles = -(-count // tile)
    threads = min(torch.get_num_threads(), tiles)
    if threads == 1:
        work(0, count)
        return
    bounds = [min(count, tiles * number // threads * tile) for number in range(threads + 1)]
    others = [_pool(threads).submit(work, *part) for part in zip(bounds[1:-1], bounds[2:], strict=True)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "rounding")


def _compiled(*fastmath: str) -> Callable[[Callable[..., Any]], Any]:
    """Compiles at the first call, with such liberties in sums; kept on disk where a folder for it can be written."""

    def compiled(function: Callable[..., Any]) -> Any:
        settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError:  # no such folder
            return numba.njit(**settings)(function)

    return compiled


@_compiled("contract")
def _round_columns(  # type: ignore[no-untyped-def]
    target, feedback, steps, zeros, has_zeros, upper, lowest, highest, codes, errors, keep, keep_squared, begin, end
):
    """Rows from ``begin`` to ``end`` through all columns of a block."""
    width, levels = len(target), np.empty(_LOOP_ROWS, np.float32)
    for first in range(begin, end, _LOOP_ROWS):
        # Slices, whose loops run over plain numbers from zero, so that they are made for several numbers at once.
        last = min(first + _LOOP_ROWS, end)
        rows, low, high = last - first, lowest[first:last], highest[first:last]
        for start in range(0, width, _TOGETHER):
            stop = min(start + _TOGETHER, width)
            for j in range(start, stop):
                value, moved, step = target[j, first:last], feedback[j, first:last], steps[j, first:last]
                zero, code, error = zeros[j, first:last], codes[j, first:last], errors[j, first:last]
                pivot = upper[j, j]
                # One result a loop: with more, the compiler would have to rule out too many overlaps, and gives up.
                for r in range(rows):
                    shift = zero[r] if has_zeros else np.float32(0)
                    level = (value[r] + keep * moved[r]) / step[r]
                    levels[r] = (min(max(level, low[r] - shift), high[r] - shift) + _ROUND) - _ROUND
                for r in range(rows):
                    error[r] = (value[r] + keep_squared * moved[r] - levels[r] * step[r]) / pivot
                for r in range(rows):
                    code[r] = np.int8(levels[r] + zero[r] if has_zeros else levels[r])
                for k in range(j + 1, stop):
                    share, later = upper[j, k], feedback[k, first:last]
                    for r in range(rows):
                        later[r] -= share * error[r]
            for k in range(stop, width):
                _spread(feedback[k, first:last], errors, upper, start, k, first, last)


@_compiled("contract")
def _spread(later, errors, upper, j, k, first, last):  # type: ignore[no-untyped-def]
    """Take what `_TOGETHER` columns from j on spread over column k."""
    a, b, c, d = upper[j, k], upper[j + 1, k], upper[j + 2, k], upper[j + 3, k]
    e, f, g, h = upper[j + 4, k], upper[j + 5, k], upper[j + 6, k], upper[j + 7, k]
    s, t, u, v = errors[j, first:last], errors[j + 1, first:last], errors[j + 2, first:last], errors[j + 3, first:last]
    w, x = errors[j + 4, first:last], errors[j + 5, first:last]
    y, z = errors[j + 6, first:last], errors[j + 7, first:last]
    for r in range(last - first):
        value = later[r] - a * s[r] - b * t[r] - c * u[r] - d * v[r]
        later[r] = value - e * w[r] - f * x[r] - g * y[r] - h * z[r]


@_compiled()
def _try_candidates(  # type: ignore[no-untyped-def]
    weight, importance, steps, zeros, errors, numbers, lowest, highest, begin, end
):
    """Rows from ``begin`` to ``end`` of every group against every candidate."""
    groups, _, width = weight.shape
    count = len(zeros)
    values, inverse = np.empty((width, _TILE_ROWS), np.float32), np.empty(_TILE_ROWS, np.float32)
    low, high = np.empty((count, _TILE_ROWS), np.float32), np.empty((count, _TILE_ROWS), np.float32)
    totals = np.empty((count, _TILE_ROWS), np.float32)
    for group in range(groups):
        for first in range(begin, end, _TILE_ROWS):
            last = min(first + _TILE_ROWS, end)
            rows, error, number = last - first, errors[group, first:last], numbers[group, first:last]
            values[:, :rows] = weight[group, first:last].T
            for index in range(count):
                low[index, :rows] = lowest - zeros[index, group, first:last]
                high[index, :rows] = highest - zeros[index, group, first:last]
            error[:], number[:] = np.inf, 0
            for candidate in range(len(steps)):
                step = steps[candidate, group, first:last]
                for r in range(rows):
                    inverse[r] = np.float32(1) / step[r]
                totals[:] = np.float32(0)
                for index in range(0, count - 1, 2):
                    one, other = index, index + 1
                    _add_squares_of_two(
                        totals[one], totals[other], values, inverse, importance[group],
                        low[one], high[one], low[other], high[other], rows,
                    )  # fmt: skip
                if count % 2:
                    _add_squares(totals[-1], values, inverse, importance[group], low[-1], high[-1], rows)
                for index in range(count):
                    total, place = totals[index], candidate * count + index
                    for r in range(rows):
                        found = total[r] * step[r] * step[r]
                        number[r] = place if found < error[r] else number[r]
                        error[r] = found if found < error[r] else error[r]


@_compiled()
def _add_squares(total, values, inverse, costs, low, high, rows):  # type: ignore[no-untyped-def]
    """Add c (w / s - q + z)² of all columns to the total of every row, four columns at a time."""
    i, width = 0, len(values)
    while i + 4 <= width:
        e, f, g, h = costs[i], costs[i + 1], costs[i + 2], costs[i + 3]
        u, v, w, x = values[i], values[i + 1], values[i + 2], values[i + 3]
        for r in range(rows):
            s, least, most = inverse[r], low[r], high[r]
            part = total[r] + e * _squared(_rounded(u[r], s), least, most, u[r], s)
            part += f * _squared(_rounded(v[r], s), least, most, v[r], s)
            part += g * _squared(_rounded(w[r], s), least, most, w[r], s)
            total[r] = part + h * _squared(_rounded(x[r], s), least, most, x[r], s)
        i += 4
    while i < width:
        cost, value = costs[i], values[i]
        for r in range(rows):
            code = _rounded(value[r], inverse[r])
            total[r] += cost * _squared(code, low[r], high[r], value[r], inverse[r])
        i += 1


@_compiled()
def _add_squares_of_two(total, other, values, inverse, costs, low, high, lower, higher, rows):  # type: ignore[no-untyped-def]
    """The same for two ranges of codes, for which a weight is rounded only once."""
    i, width = 0, len(values)
    while i + 2 <= width:
        e, f, u, v = costs[i], costs[i + 1], values[i], values[i + 1]
        for r in range(rows):
            s, code, next_code = inverse[r], _rounded(u[r], inverse[r]), _rounded(v[r], inverse[r])
            part = total[r] + e * _squared(code, low[r], high[r], u[r], s)
            total[r] = part + f * _squared(next_code, low[r], high[r], v[r], s)
            part = other[r] + e * _squared(code, lower[r], higher[r], u[r], s)
            other[r] = part + f * _squared(next_code, lower[r], higher[r], v[r], s)
        i += 2
    while i < width:
        cost, value = costs[i], values[i]
        for r in range(rows):
            code = _rounded(value[r], inverse[r])
            total[r] += cost * _squared(code, low[r], high[r], value[r], inverse[r])
            other[r] += cost * _squared(code, lower[r], higher[r], value[r], inverse[r])
        i += 1


@_compiled()
def _rounded(value, inverse):  # type: ignore[no-untyped-def]
    """The nearest integer to a value in steps; huge ones stay huge, whatever they become."""
    return (value * inverse + _ROUND) - _ROUND


@_compiled()
def _squared(code, low, high, value, inverse):  # type: ignore[no-untyped-def]
    """Squared distance of a value to the nearest code, both in steps."""
    difference = min(max(code, low), high) - value * inverse
    return difference * difference
