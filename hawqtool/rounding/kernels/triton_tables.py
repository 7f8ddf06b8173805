"""The column loop of one block of columns whose codes stand for values of a table, as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hawqtool.rounding.kernels.triton_columns import BLOCK_COLUMNS

_TILES = ((1024, 8), (512, 4), (0, 2))
"""Fewest rows of a call, and the rows of a program: few rows are shared by more of a GPU's processors."""


@triton.jit
def _round_table_kernel(  # type: ignore[no-untyped-def]
    target,
    steps,
    upper,
    table,
    codes,
    errors,
    rows,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of rows through all columns of a block; the feedback of the block stays in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    column = tl.arange(0, COLUMNS)
    carried = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for j in range(0, WIDTH):
        place = j * rows + row
        value = tl.load(target + place, mask=is_row, other=0.0)
        step = tl.load(steps + place, mask=is_row, other=1.0)
        factors = tl.load(upper + j * WIDTH + column, mask=(column < WIDTH) & (column > j), other=0.0)
        pivot = tl.load(upper + j * WIDTH + j)
        current = value + tl.sum(tl.where(column[:, None] == j, carried, 0.0), axis=0)
        level = tl.div_rn(current, step)
        # Values ascend: the last one whose middle to the value below it lies under the level is the nearest.
        below = tl.load(table)
        nearest = tl.zeros((ROWS,), dtype=tl.float32) + below
        code = tl.zeros((ROWS,), dtype=tl.int32)
        for number in tl.static_range(1, VALUES):
            above = tl.load(table + number)
            is_over = level > (below + above) * 0.5
            nearest = tl.where(is_over, above, nearest)
            code = tl.where(is_over, number, code)
            below = above
        error = tl.div_rn(tl.fma(-nearest, step, current), pivot)
        tl.store(errors + place, error, mask=is_row)
        tl.store(codes + place, code.to(tl.int8), mask=is_row)
        carried = tl.fma(-factors[:, None], error[None, :], carried)


def round_block(target: Tensor, steps: Tensor, upper: Tensor, table: Tensor, codes: Tensor, errors: Tensor) -> None:
    """Round the columns of one block, each with the errors of those before it in the block; division is IEEE.

    Args:
        target: ``[width, rows]`` float32, columns in visiting order; at most `BLOCK_COLUMNS`.
        steps: ``[width, rows]`` float32.
        upper: ``[width, width]`` float32, the block of U on its diagonal; any strides.
        table: ``[values]`` float32, ascending.
        codes: ``[width, rows]`` int8, written: place in the table of the nearest value, of two the lower one.
        errors: ``[width, rows]`` float32, written: e_j, for the update of later blocks.
    """
    width, rows = target.shape
    tile = next(size for least, size in _TILES if rows >= least)
    with torch.cuda.device_of(target):
        _round_table_kernel[(triton.cdiv(rows, tile),)](
            target,
            steps,
            upper.contiguous(),
            table,
            codes,
            errors,
            rows,
            WIDTH=width,
            VALUES=len(table),
            COLUMNS=BLOCK_COLUMNS,
            ROWS=tile,
            num_warps=1,
        )
