"""The column loop of one block as one Triton kernel, for GPUs, where the eager loop only waits for launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hawqtool.rounding.kernels.column_block import ColumnBlock, FloatCodes

BLOCK_COLUMNS = 128
"""Columns of a block, the height of the kernel's tile (a power of two)."""
_TILES = ((1024, 8), (512, 4), (0, 2))
"""Fewest rows of a call, and the rows of a program: one warp holds its whole tile in registers and sums over columns
without a barrier. A GPU has about 132 processors: few rows, as those of output feedback, are shared by more of them,
each of which then has less to do in a column. The bits are the same: a sum has one term that is not zero.
"""


@triton.jit
def _rounded(level):  # type: ignore[no-untyped-def]
    """The nearest integer: adding 1.5 · 2^23 leaves no bits below one, so the sum rounds half to even.

    Bounds are integers, so that clipping before it changes nothing.
    """
    return (level + 12582912.0) - 12582912.0


@triton.jit
def _nearest_float(  # type: ignore[no-untyped-def]
    level, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr
):
    """The nearest small float, half to even, and its bits as an E4M3 number, which all codes are in memory."""
    magnitude = tl.minimum(tl.abs(level), LARGEST)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, LEAST)
    # Powers of two by their bits: the spacing of values around the magnitude, and its inverse.
    spacing = ((exponent - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((MANTISSA - exponent + 127) << 23).to(tl.float32, bitcast=True)
    magnitude = _rounded(magnitude * inverse) * spacing
    bits = magnitude.to(tl.int32, bitcast=True)
    # E4M3 has a bias of 7 and three bits of mantissa; below 2^-6 its codes count steps of 2^-9.
    code = tl.where(magnitude < 0.015625, (magnitude * 512.0).to(tl.int32), (bits >> 20) - (120 << 3))
    negative = level.to(tl.int32, bitcast=True) < 0
    return tl.where(negative, -magnitude, magnitude), tl.where(negative, code | 128, code).to(tl.int8)


@triton.jit
def _round_block_kernel(  # type: ignore[no-untyped-def]
    target,
    feedback,
    steps,
    zeros,
    upper,
    lowest,
    highest,
    codes,
    errors,
    rows,
    keep,
    keep_squared,
    WIDTH: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    MANTISSA: tl.constexpr = -1,
    LEAST: tl.constexpr = 0,
    LARGEST: tl.constexpr = 0.0,
):
    """A tile of rows through all columns of a block; the feedback of the block stays in registers.

    Codes are integers, or floats of so many bits of mantissa, from an exponent on, up to a largest one.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    column = tl.arange(0, COLUMNS)
    is_column = column < WIDTH
    inside = is_column[:, None] & is_row[None, :]
    carried = tl.load(feedback + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    low = tl.load(lowest + row, mask=is_row, other=0.0)
    high = tl.load(highest + row, mask=is_row, other=0.0)
    for j in range(0, WIDTH):
        place = j * rows + row
        value = tl.load(target + place, mask=is_row, other=0.0)
        step = tl.load(steps + place, mask=is_row, other=1.0)
        factors = tl.load(upper + j * WIDTH + column, mask=is_column & (column > j), other=0.0)
        pivot = tl.load(upper + j * WIDTH + j)
        current = tl.sum(tl.where(column[:, None] == j, carried, 0.0), axis=0)
        level = tl.div_rn(tl.fma(current, keep, value), step)
        if MANTISSA >= 0:
            level, code = _nearest_float(level, MANTISSA, LEAST, LARGEST)
        elif HAS_ZEROS:
            zero = tl.load(zeros + place, mask=is_row, other=0.0)
            level = _rounded(tl.minimum(tl.maximum(level, low - zero), high - zero))
            code = (level + zero).to(tl.int8)
        else:
            level = _rounded(tl.minimum(tl.maximum(level, low), high))
            code = level.to(tl.int8)
        error = tl.div_rn(tl.fma(-level, step, tl.fma(current, keep_squared, value)), pivot)
        tl.store(errors + place, error, mask=is_row)
        tl.store(codes + place, code, mask=is_row)
        carried = tl.fma(-factors[:, None], error[None, :], carried)


def tile_rows(rows: int) -> int:
    """Rows of a program, where so many go through the loop."""
    return next(size for least, size in _TILES if rows >= least)


def round_block(block: ColumnBlock, beta: float, floats: FloatCodes | None = None) -> None:
    """Round the columns of one block; the arithmetic is that of `hawqtool.rounding.gptq.round_compensated`.

    Products are fused into sums, as CUDA's own ``add``, ``addcmul`` and ``addr`` do; division is IEEE, rounding
    half to even.

    Args:
        block: Its tensors, float32; at most `BLOCK_COLUMNS` columns.
        beta: FOEM's β.
        floats: Codes that are floats, written as the bytes of E4M3 numbers; None for integers.
    """
    target, zeros = block.target, block.zeros
    width, rows = target.shape
    tile = tile_rows(rows)
    with torch.cuda.device_of(target):
        _round_block_kernel[(triton.cdiv(rows, tile),)](
            target,
            block.feedback,
            block.scales,
            target if zeros is None else zeros,
            block.upper.contiguous(),
            block.lowest,
            block.highest,
            block.codes,
            block.errors,
            rows,
            1.0 - beta,
            (1.0 - beta) ** 2,
            WIDTH=width,
            HAS_ZEROS=zeros is not None,
            COLUMNS=BLOCK_COLUMNS,
            ROWS=tile,
            num_warps=1,
            **({} if floats is None else _constants(floats)),
        )


def _constants(floats: FloatCodes) -> dict[str, Any]:
    return {"MANTISSA": floats.mantissa_bits, "LEAST": floats.least_exponent, "LARGEST": floats.largest}
