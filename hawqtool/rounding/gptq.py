"""The column loop of GPTQ and of FOEM, in the form of its authors' code and in that of its paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hawqtool.rounding.factor import Factor
from hawqtool.rounding.floats.elements import CODE_DTYPE, Element
from hawqtool.rounding.kernels import tensor_cores
from hawqtool.rounding.kernels.column_block import ColumnBlock, FloatCodes
from hawqtool.rounding.kernels.dispatch import column_loop
from hawqtool.rounding.kernels.recorded_loop import MOST_ROWS, UNRECORDED_USES, RecordedLoop
from hawqtool.rounding.kernels.tensor_cores import LaterColumns

BLOCK_SIZE = 32
"""Columns per lazy update: 32 was up to twice as fast as the customary 128 on a CPU; the codes do not depend on it."""

PAPER_BLOCK = 128
"""Columns of a block in FOEM's paper, on which its codes depend."""

_TRANSPOSED_ROWS = 384
"""Rows that are transposed together: 9216 x 576 in float32 took 16 ms as a whole, so 5."""

_LONG_COLUMN = 8192
"""Rows from which the loop uses all CPU threads; two took up to 1.8 times as long as one with 576 to 3072 rows."""


PartsWriter = Callable[[Tensor, Tensor], None]
"""Writes the parts of errors ``[width, rows]`` to ``[3 width, rows]``."""


class RowGrids(NamedTuple):
    """The grids of stacked rows.

    Args:
        scales: ``[rows, groups]`` float32, of each group of columns (may be negative).
        lowest: ``[rows]`` float32, smallest code of each row.
        highest: ``[rows]`` float32, largest code of each row.
        zeros: ``[rows, groups]`` float32, the zero point of each group, an integer; None for symmetric grids.
        element: Values of codes that are floats; None for integers.
    """

    scales: Tensor
    lowest: Tensor
    highest: Tensor
    zeros: Tensor | None = None
    element: Element | None = None


def round_compensated(
    weight: Tensor,
    grids: RowGrids,
    factor: Factor,
    beta: float = 0.0,
    block_size: int | None = None,
    column_errors: Tensor | None = None,
    paper_form: bool = False,
) -> Tensor:
    """Round column by column, spreading each error over the columns still to come.

    With the feedback c (zero at the start) and U from the factor, for each column j in visiting order:
    ``q_j = round(w0_j + (1-β) c_j)``, ``e_j = [w0_j + (1-β)² c_j - q_j] / U_jj``, ``c_k -= e_j U_jk`` for k > j.
    β = 0 is GPTQ (Frantar et al. 2023, Algorithm 1); β > 0 is FOEM as its authors' code in GPTQModel has it
    (arXiv 2507.11017, eq. 19 applied to each column once, just before it is rounded, so the block size does not
    matter; the paper's own form: see `_faded`); β = 1 is plain rounding. Here q_j is the nearest value of the grid,
    ``scale * code``, or ``scale * (code - zero)``.

    Rows are independent: layers that share inputs, and several formats of one layer, may be stacked.

    Args:
        weight: ``[rows, in]`` float32; compiled kernels take no other dtype, the eager loop float64 too.
        grids: Scales, zero points and ranges of codes.
        factor: Factor of the Gram matrix of the inputs.
        beta: FOEM's pull towards the original weights, 0 to 1, in the paper's form less than 1.
        block_size: Columns whose updates to later columns are applied together; None: `BLOCK_SIZE`, or what the
            kernel likes best; Triton's takes at most 128.
        column_errors: ``[in, rows]`` like the weight, written: e_j of every column in visiting order; None where
            nobody wants to know. With β = 0 the sum of their squares in a row is that row's damped loss D (H + λI) Dᵀ.
        paper_form: Whether FOEM is the paper's; blocks then have 128 columns.

    Returns:
        Codes, ``[rows, in]`` int8, or float8_e4m3fn where they are floats, in natural column order.
    """
    # Columns in visiting order, each a contiguous row: the loop goes through them one by one.
    target = _transposed(weight).index_select(0, factor.order)
    scales, zeros = _visited(grids.scales, factor), None if grids.zeros is None else _visited(grids.zeros, factor)
    element, limits = grids.element, (grids.lowest, grids.highest)
    own_size, round_block, compiled = _block_rounding(weight, element)
    size = PAPER_BLOCK if paper_form else block_size or own_size
    write_parts = _parts_writer(weight, element) if compiled and size == own_size else None
    alone = weight.is_cuda and not torch.cuda.is_current_stream_capturing()  # a recording takes the loops as they are
    if alone and compiled and size == own_size and not paper_form:
        kind = element.name if element else zeros is not None
        recorded = _recorded(factor, target, kind, beta, size, round_block, write_parts)
        if recorded is not None:
            return _natural(recorded.run(target, scales, zeros, limits, column_errors), factor, element)
    feedback, codes = torch.zeros_like(target), torch.empty_like(target, dtype=torch.int8)
    errors = torch.empty_like(target[:size]) if column_errors is None else column_errors
    columns = target, feedback, scales, zeros, codes, errors
    later_columns = LaterColumns(feedback, write_parts)
    blocks = _blocks(columns, _steps(factor, size, write_parts), column_errors is not None)
    with later_columns.products():
        for (w, fed, scale, zero, code, error), (upper, later) in blocks:
            diagonal = _faded(upper, fed, beta) if paper_form else upper
            block = ColumnBlock(w, fed, scale, zero, diagonal, *limits, code, error)
            round_block(block, beta)
            later_columns.update(later, block.errors)
    return _natural(codes, factor, element)


def _natural(codes: Tensor, factor: Factor, element: Element | None) -> Tensor:
    """Codes ``[rows, in]`` in natural order from ``[in, rows]`` int8 in visiting order."""
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return _transposed(result) if element is None else _transposed(result).view(CODE_DTYPE)


def _recorded(
    factor: Factor,
    target: Tensor,
    kind: str | bool,
    beta: float,
    size: int,
    round_block: Callable[[ColumnBlock, float], None],
    write_parts: PartsWriter | None = None,
) -> RecordedLoop | None:
    """The loop as a graph, where few rows go through it over and over again; None for others and the first times.

    Its kind is the element of floats, or whether integers have zero points.
    """
    rows = target.shape[1]
    form = rows, kind, beta
    known = factor.recorded.get(form, 0)
    if rows > MOST_ROWS or isinstance(known, RecordedLoop):
        return known or None
    if known < UNRECORDED_USES:
        factor.recorded[form] = known + 1
        return None
    steps = _steps(factor, size, write_parts)
    loop = factor.recorded[form] = RecordedLoop(steps, target, kind is True, round_block, beta, write_parts)
    return loop


def _parts_writer(weight: Tensor, element: Element | None) -> PartsWriter | None:
    """What splits errors for updates on tensor cores, where a GPU has so many weights that it pays."""
    if not weight.is_cuda or weight.numel() < tensor_cores.LEAST_WEIGHTS:
        return None
    fused = column_loop(weight.device, element is not None)
    return None if fused is None else fused.write_parts


def _steps(factor: Factor, size: int, write_parts: PartsWriter | None) -> list[tuple[Tensor, Tensor]]:
    """U by blocks of columns, as later ones are updated with it."""
    return factor.steps(size) if write_parts is None else factor.steps_of_parts(size)


def _block_rounding(weight: Tensor, element: Element | None) -> tuple[int, Callable[[ColumnBlock, float], None], bool]:
    """Columns of a block, what rounds them, and whether that is compiled, as it is where the kernel knows the codes."""
    fused = column_loop(weight.device, element is not None) if weight.dtype == torch.float32 else None
    if fused is None:
        eager = _round_block if element is None else partial(_round_float_block, element=element)
        return BLOCK_SIZE, eager, False
    if element is None:
        return fused.BLOCK_COLUMNS, fused.round_block, True
    codes = FloatCodes(element.mantissa_bits, element.least_exponent, element.largest)
    return fused.BLOCK_COLUMNS, partial(fused.round_block, floats=codes), True


def _blocks(
    columns: tuple[Tensor | None, ...], steps: Sequence[tuple[Tensor, Tensor]], keeps_errors: bool
) -> Iterator[tuple[tuple[Any, ...], tuple[Tensor, Tensor]]]:
    """Tensors ``[in, rows]`` by blocks, each with its part of U; errors, which come last, have one place for all."""
    first = 0
    for step in steps:
        part = slice(first, first + len(step[0]))
        *others, errors = columns
        own = errors[part if keeps_errors else slice(len(step[0]))] if errors is not None else None
        yield (*(None if values is None else values[part] for values in others), own), step
        first = part.stop


def _faded(upper: Tensor, feedback: Tensor, beta: float) -> Tensor:
    """The block of U with which the loop of the authors' code rounds as Algorithm 1 of FOEM's paper does.

    That pulls all later columns of a block of 128 at each step, and none of other blocks: ``q_j = round(w0_j + c_j)``,
    ``e_j = [w0_j + (1-β) c_j - q_j] / U_jj``, ``c_k = (1-β) c_k - e_j U_jk`` for k > j in the block,
    ``c_k -= e_j U_jk`` behind it. So feedback of column i is worth (1-β)^(k-i-1) when column k comes, what earlier
    blocks left (1-β)^k. The loop takes (1-β) of it for the target and (1-β)² for the error, the paper 1 and (1-β): so
    all is divided by 1-β.

    Args:
        upper: ``[width, width]``, the block of U on its diagonal.
        feedback: ``[width, rows]``, what earlier blocks left; changed.
        beta: β, less than 1.
    """
    place = torch.arange(len(upper), dtype=upper.dtype, device=upper.device)
    feedback.mul_((1 - beta) ** (place - 1)[:, None])
    fading = (1 - beta) ** (place - place[:, None] - 2)
    return torch.triu(upper * fading, 1) + torch.diag(upper.diagonal())


def _transposed(matrix: Tensor) -> Tensor:
    """``[m, n]`` as ``[n, m]`` in memory."""
    result = matrix.new_empty(matrix.shape[::-1])
    if matrix.is_cuda:
        return result.copy_(matrix.t())
    for part, columns in zip(matrix.split(_TRANSPOSED_ROWS), result.split(_TRANSPOSED_ROWS, 1), strict=True):
        columns.copy_(part.t())
    return result


def row_losses(weight: Tensor, rounded: Tensor, factor: Factor) -> Tensor:
    """Damped loss D (H + λI) Dᵀ of every row, ``[rows]`` float32.

    Args:
        weight: ``[rows, in]`` float32.
        rounded: ``[rows, in]`` float32, what it became.
        factor: Factor of the damped Gram matrix.
    """
    return loop_errors(weight, rounded, factor).square().sum(1)


def loop_errors(weight: Tensor, rounded: Tensor, factor: Factor) -> Tensor:
    """e_j of every column of a loop without β, from what it rounded to: ``[rows, in]`` float32 in visiting order.

    The loop leaves W0 - Q = e U, so e is found without running it (the arguments are those of `row_losses`).
    """
    difference = (weight - rounded).index_select(1, factor.order)
    return torch.linalg.solve_triangular(factor.upper, difference, upper=True, left=False)


def targets_at_turn(
    weight: Tensor, rounded: Tensor, column_errors: Tensor, factor: Factor, beta: float = 0.0
) -> Tensor:
    """What the column loop rounded when it came to each column, w0_j + (1-β) c_j: ``[rows, in]`` float32.

    Args:
        weight: ``[rows, in]`` float32, what the loop was given.
        rounded: ``[rows, in]`` float32, the values of the grid that it took.
        column_errors: ``[in, rows]`` float32, its errors (see `round_compensated`).
        factor: Its factor.
        beta: Its β, less than 1.
    """
    own = (column_errors * factor.upper.diagonal()[:, None]).index_select(0, factor.places).t()
    return rounded + own if beta == 0 else weight + (rounded - weight + own) / (1 - beta)


@contextmanager
def _threads_for(target: Tensor) -> Iterator[None]:
    """One CPU thread where a column is so short that waking a second one takes longer than its arithmetic."""
    threads = torch.get_num_threads()
    if target.is_cuda or target.shape[1] >= _LONG_COLUMN or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _visited(values: Tensor, factor: Factor) -> Tensor:
    """Values of groups ``[rows, groups]`` by column in visiting order, ``[in, rows]``, each a contiguous row."""
    width = len(factor.order) // values.shape[1]
    return values.t().contiguous().index_select(0, factor.order // width)


def _round_block(block: ColumnBlock, beta: float) -> None:
    """One block of columns by torch's own operations."""
    target, feedback, scales, zeros, upper, lowest, highest, codes, errors = block
    keep, keep_squared = 1.0 - beta, (1.0 - beta) ** 2
    levels = torch.empty_like(errors)
    limits = repeat((lowest, highest)) if zeros is None else zip(lowest - zeros, highest - zeros, strict=True)
    # Views of all columns at once: taking them one by one costs as much as the arithmetic.
    columns = zip(target, feedback, scales, levels, errors, limits, upper.diagonal().tolist(), strict=False)
    with _threads_for(target):
        for j, (weight, moved, scale, level, error, (low, high), pivot) in enumerate(columns, 1):
            # Codes less their zeros: a zero is an integer, so it moves the range and nothing else.
            torch.add(weight, moved, alpha=keep, out=level).div_(scale).round_().clamp_(low, high)
            torch.add(weight, moved, alpha=keep_squared, out=error).addcmul_(level, scale, value=-1.0).div_(pivot)
            feedback[j:].addr_(upper[j - 1, j:], error, alpha=-1.0)
    codes.copy_(levels if zeros is None else levels.add_(zeros))


def _round_float_block(block: ColumnBlock, beta: float, element: Element) -> None:
    """One block of columns whose codes are floats: the nearest value of the codebook, whatever its distance."""
    target, feedback, scales, _, upper, _, _, codes, errors = block
    keep, keep_squared = 1.0 - beta, (1.0 - beta) ** 2
    columns = zip(target, feedback, scales, codes, errors, upper.diagonal().tolist(), strict=False)
    with _threads_for(target):
        for j, (weight, moved, scale, code, error, pivot) in enumerate(columns, 1):
            level = element.nearest_(torch.add(weight, moved, alpha=keep).div_(scale))
            torch.add(weight, moved, alpha=keep_squared, out=error).addcmul_(level, scale, value=-1.0).div_(pivot)
            feedback[j:].addr_(upper[j - 1, j:], error, alpha=-1.0)
            code.view(CODE_DTYPE).copy_(level)  # few operations on a GPU know floats of one byte
