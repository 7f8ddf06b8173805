"""Errors of all candidates of the scale search in one Triton kernel: each weight is read once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ROWS = 8
_MAX_TILE_WIDTH = 256
"""Wider groups are cut into parts, whose errors are added afterwards."""


@triton.jit
def _candidate_errors_kernel(  # type: ignore[no-untyped-def]
    weight,
    importance,
    steps,
    zeros,
    errors,
    rows,
    plane,
    lowest,
    highest,
    GROUP_WIDTH: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile of rows of one part of one group, which stays in registers, against every candidate."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    is_row = row < rows
    column = part * WIDTH + tl.arange(0, WIDTH)
    is_column = column < GROUP_WIDTH
    inside = is_row[:, None] & is_column[None, :]
    place = group * rows + row
    values = tl.load(weight + place[:, None] * GROUP_WIDTH + column[None, :], mask=inside, other=0.0)
    costs = tl.load(importance + group * GROUP_WIDTH + column, mask=is_column, other=0.0)
    out = errors + part * (CANDIDATES * ZEROS) * plane + place
    for candidate in range(0, CANDIDATES):
        step = tl.load(steps + candidate * plane + place, mask=is_row, other=1.0)
        scaled = values * tl.div_rn(1.0, step)[:, None]
        for index in range(0, ZEROS):
            zero = tl.load(zeros + index * plane + place, mask=is_row, other=0.0)
            level = tl.minimum(tl.maximum(scaled, (lowest - zero)[:, None]), (highest - zero)[:, None])
            # Rounds half to even, as in `triton_columns`.
            level = (level + 12582912.0) - 12582912.0
            difference = level - scaled
            error = tl.sum(difference * difference * costs[None, :], axis=1) * step * step
            tl.store(out + (candidate * ZEROS + index) * plane, error, mask=is_row)


def least_errors(
    weight: Tensor, importance: Tensor, steps: Tensor, zeros: Tensor, lowest: float, highest: float
) -> tuple[Tensor, Tensor]:
    """Least sum over a group of c (w - s (q - z))² among all candidate scales with all zero points.

    Args:
        weight: ``[groups, rows, width]`` float32, contiguous.
        importance: ``[groups, width]`` float32, contiguous.
        steps: ``[candidates, groups, rows]`` float32; NaN for one that cannot be used.
        zeros: ``[zeros, groups, rows]`` float32 integers.
        lowest: Smallest code.
        highest: Largest code.

    Returns:
        The error, ``[groups, rows]`` float32, inf where no candidate can be used, and the number of the first that has
        it, int64: candidate * zeros + zero.
    """
    errors = _candidate_errors(weight, importance, steps, zeros, lowest, highest)
    return errors.nan_to_num_(nan=float("inf"), posinf=float("inf")).min(0)


def _candidate_errors(
    weight: Tensor, importance: Tensor, steps: Tensor, zeros: Tensor, lowest: float, highest: float
) -> Tensor:
    """The error of every candidate with every zero point: ``[candidates * zeros, groups, rows]`` float32."""
    groups, rows, width = weight.shape
    constants = _constants(width, len(steps), len(zeros))
    parts = triton.cdiv(width, constants["WIDTH"])
    errors = weight.new_empty(parts, len(steps) * len(zeros), groups, rows)
    with torch.cuda.device_of(weight):
        _candidate_errors_kernel[(triton.cdiv(rows, _TILE_ROWS), groups, parts)](
            weight,
            importance,
            steps.contiguous(),
            zeros.contiguous(),
            errors,
            rows,
            groups * rows,
            float(lowest),
            float(highest),
            **constants,
        )
    return errors[0] if parts == 1 else errors.sum(0)


def compile_ahead(device: torch.device, widths: Iterable[int], searches: Sequence[tuple[int, int]]) -> None:
    """Compile the kernel for groups of some widths, which takes seconds where Triton's cache has it not.

    Args:
        device: The GPU.
        widths: Columns of a group.
        searches: Numbers of candidates and of zero points that are tried together.
    """
    with torch.cuda.device(device):
        for constants in (_constants(width, *search) for width in widths for search in searches):
            # Numbers of rows and groups stand for others, which are multiples of 16 like them for the most part.
            tensors = [torch.float32] * 5
            _candidate_errors_kernel.warmup(*tensors, 4096, 4096, -8.0, 7.0, grid=(1,), **constants)


def _constants(width: int, candidates: int, zeros: int) -> dict[str, int]:
    tile = min(triton.next_power_of_2(width), _MAX_TILE_WIDTH)
    known = {"GROUP_WIDTH": width, "CANDIDATES": candidates, "ZEROS": zeros, "ROWS": _TILE_ROWS, "WIDTH": tile}
    return {**known, "num_warps": 2}
