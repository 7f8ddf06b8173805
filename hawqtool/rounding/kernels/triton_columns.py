"""The column loop of one block as one Triton kernel, for GPUs, where the eager loop only waits for launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hawqtool.rounding.kernels.column_block import ColumnBlock, FloatCodes
from hawqtool.rounding.kernels.triton_codes import nearest_float, nearest_integer
from hawqtool.rounding.kernels.triton_few_rows import AT_A_TIME, MOST_ROWS, round_few_rows_kernel

BLOCK_COLUMNS = 128
"""Columns of a block, the height of the kernel's tile (a power of two)."""
_MANY_ROWS = 8
"""Rows of a program where there are many: one warp holds its whole tile in registers and sums over columns without a
barrier. Fewer rows go through `triton_few_rows`.
"""

_PARTS_SIZE = 1024
"""Values that a program splits."""

_FEW_ROWS = ((2048, 4), (0, 1))
"""Fewest rows of a call, and the rows of a program, below `MOST_ROWS`. A GPU has about 132 processors: few rows, as
those of output feedback, are shared by more programs, each of which then has less to do in a column. The bits are the
same: a sum has one term that is not zero.
"""


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
            level, code = nearest_float(level, MANTISSA, LEAST, LARGEST)
        elif HAS_ZEROS:
            zero = tl.load(zeros + place, mask=is_row, other=0.0)
            level = nearest_integer(tl.minimum(tl.maximum(level, low - zero), high - zero))
            code = (level + zero).to(tl.int8)
        else:
            level = nearest_integer(tl.minimum(tl.maximum(level, low), high))
            code = level.to(tl.int8)
        error = tl.div_rn(tl.fma(-level, step, tl.fma(current, keep_squared, value)), pivot)
        tl.store(errors + place, error, mask=is_row)
        tl.store(codes + place, code, mask=is_row)
        carried = tl.fma(-factors[:, None], error[None, :], carried)


@triton.jit
def _parts_kernel(values, parts, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """High, high and low parts of values, as `tensor_cores.split_in_two` has them."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    value = tl.load(values + place, mask=inside, other=0.0)
    high = ((value.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    tl.store(parts + place, high, mask=inside)
    tl.store(parts + count + place, high, mask=inside)
    tl.store(parts + 2 * count + place, value - high, mask=inside)


def write_parts(errors: Tensor, parts: Tensor) -> None:
    """Write the parts of errors ``[width, rows]`` float32 to ``[3 width, rows]``: high, high and low.

    One kernel does it, since an operation each would launch four and read the errors as often.
    """
    with torch.cuda.device_of(errors):
        count = errors.numel()
        _parts_kernel[(triton.cdiv(count, _PARTS_SIZE),)](errors, parts, count, SIZE=_PARTS_SIZE)


def tile_rows(rows: int) -> int:
    """Rows of a program, where so many go through the loop."""
    return _MANY_ROWS if rows >= MOST_ROWS else next(size for least, size in _FEW_ROWS if rows >= least)


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
    kernel, constants = _chosen(rows, width, zeros is not None)
    with torch.cuda.device_of(target):
        kernel[(triton.cdiv(rows, constants["ROWS"]),)](
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
            **constants,
            **({} if floats is None else _constants(floats)),
        )


def compile_ahead(device: torch.device, has_zeros: bool) -> None:
    """Compile the kernels for whole blocks of integers, which takes seconds where Triton's cache has them not.

    Args:
        device: The GPU.
        has_zeros: Whether grids have zero points.
    """
    numbers, codes = torch.float32, torch.int8  # stand for tensors of theirs
    with torch.cuda.device(device):
        for rows in (*(max(least, 16) for least, _ in _FEW_ROWS), MOST_ROWS):  # like most, a multiple of 16
            kernel, constants = _chosen(rows, BLOCK_COLUMNS, has_zeros)
            kernel.warmup(*[numbers] * 7, codes, numbers, rows, 1.0, 1.0, grid=(1,), **constants)
        _parts_kernel.warmup(numbers, numbers, 16, grid=(1,), SIZE=_PARTS_SIZE)


def _chosen(rows: int, width: int, has_zeros: bool) -> tuple[Any, dict[str, Any]]:
    """The kernel for so many rows and columns, and its constants."""
    known = {"WIDTH": width, "HAS_ZEROS": has_zeros, "COLUMNS": BLOCK_COLUMNS, "ROWS": tile_rows(rows), "num_warps": 1}
    if rows >= MOST_ROWS:
        return _round_block_kernel, known
    return round_few_rows_kernel, {**known, "WHOLE": width % AT_A_TIME == 0}


def _constants(floats: FloatCodes) -> dict[str, Any]:
    return {"MANTISSA": floats.mantissa_bits, "LEAST": floats.least_exponent, "LARGEST": floats.largest}
