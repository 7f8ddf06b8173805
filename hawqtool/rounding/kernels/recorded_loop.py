"""The column loop over one factor as a graph of a GPU's kernels, for the few rows that output feedback rounds at once.

With 256 rows a block of columns takes a GPU 33 µs and the host, that launches its two kernels, 90. A factor is looped
over twice for each of 16 blocks of rows, so the launches are recorded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hawqtool.rounding.kernels.column_block import ColumnBlock
from hawqtool.rounding.kernels.tensor_cores import LaterColumns

MOST_ROWS = 512
"""Rows from which a GPU is slower than its host."""

UNRECORDED_USES = 2
"""Loops over a factor before one is recorded: compiling, and layers that are rounded as a whole."""

_streams: dict[torch.device, torch.cuda.Stream] = {}


class RecordedLoop:
    """Column loops of equal form over one factor.

    Args:
        steps: U by blocks of columns (see `Factor.steps`), with ``write_parts`` in parts (see `Factor.steps_of_parts`).
        target: ``[in, rows]`` float32, whose form and device all others have.
        has_zeros: Whether grids have zero points.
        round_block: Rounds one block of columns.
        beta: FOEM's β.
        write_parts: How later columns are updated (see `LaterColumns`).
    """

    def __init__(
        self,
        steps: Sequence[tuple[Tensor, Tensor]],
        target: Tensor,
        has_zeros: bool,
        round_block: Callable[[ColumnBlock, float], None],
        beta: float,
        write_parts: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self._target, self._feedback, self._errors = (torch.zeros_like(target) for _ in range(3))
        self._scales, self._zeros = torch.ones_like(target), torch.zeros_like(target) if has_zeros else None
        self._lowest, self._highest = (target.new_zeros(target.shape[1]) for _ in range(2))
        self._codes = torch.zeros_like(target, dtype=torch.int8)
        self._later = LaterColumns(self._feedback, write_parts)
        self._graph = torch.cuda.CUDAGraph()
        stream = _recording_stream(target.device)
        stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(stream):
            self._graph.capture_begin(capture_error_mode="thread_local")  # other threads go on meanwhile
            try:
                with self._later.products():
                    self._loop(steps, round_block, beta)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(target.device).wait_stream(stream)

    def _loop(
        self, steps: Sequence[tuple[Tensor, Tensor]], round_block: Callable[[ColumnBlock, float], None], beta: float
    ) -> None:
        self._feedback.zero_()
        first = 0
        for upper, later in steps:
            part = slice(first, first + len(upper))
            first = part.stop
            zeros = None if self._zeros is None else self._zeros[part]
            block = ColumnBlock(
                self._target[part], self._feedback[part], self._scales[part], zeros, upper,
                self._lowest, self._highest, self._codes[part], self._errors[part],
            )  # fmt: skip
            round_block(block, beta)
            self._later.update(later, block.errors)

    def run(
        self,
        target: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        limits: tuple[Tensor, Tensor],
        column_errors: Tensor | None,
    ) -> Tensor:
        """Codes ``[in, rows]`` in visiting order, which the next run overwrites; errors are written as they are found.

        Args:
            target: ``[in, rows]``, what is rounded.
            scales: ``[in, rows]``.
            zeros: ``[in, rows]``, where there are any.
            limits: Smallest and largest code of each row.
            column_errors: ``[in, rows]``, written; None where nobody wants to know.
        """
        given = (target, self._target), (scales, self._scales), *zip(limits, (self._lowest, self._highest), strict=True)
        for value, place in given:
            place.copy_(value)
        if zeros is not None and self._zeros is not None:
            self._zeros.copy_(zeros)
        self._graph.replay()
        if column_errors is not None:
            column_errors.copy_(self._errors)
        return self._codes


def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for recording, whose handles and buffers exist before the first."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(_streams[device]):
            ones = torch.ones(8, 8, dtype=torch.float32, device=device)
            torch.zeros_like(ones).addmm_(ones, ones)
    return _streams[device]
