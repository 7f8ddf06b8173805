"""Second moments of the gradients at the outputs of linears, for output feedback, and of blocks, for refinement."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hawqtool.records import OutputMoments
from hawqtool.rounding.gram import gram
from hawqtool.rounding.output_feedback import choose_moments, pack_lower
from hawqtool.runtime.background import Background
from hawqtool.runtime.ranks import ALONE, Ranks

FITTING, HELD_OUT, LEFT_OUT = 0, 1, 2
"""Kinds of rows: those that moments are taken of, the others that judge them, and those that nothing may see."""

Sums = dict[str, Tensor]
"""By name of the linear: sums of g gᵀ / ‖g‖ over fitting and over held-out tokens, ``[2, out, out]`` float32."""


class OutputMomentSums:
    """Sums the second moments of gradients over rows, and makes moments for rounding of them.

    The weight ‖g‖⁻¹ is that of `token_importance`: a token counts by ‖g‖ on both sides, and S has the directions.

    Args:
        names: Linears whose moments are wanted for feedback.
        blocks: Blocks whose moments are wanted, of gradients times the norm of the output that they belong to.
        kinds: ``[rows]`` int64, the kind of each row.
        keep_held_out: Whether settings are going to be chosen on held-out rows.
        ranks: Processes that share the rows.

    Attributes:
        finished: Moments by name of the linear or block.
    """

    def __init__(
        self,
        names: frozenset[str],
        kinds: Tensor,
        keep_held_out: bool,
        ranks: Ranks = ALONE,
        blocks: frozenset[str] = frozenset(),
    ) -> None:
        self.names, self.kinds, self.keep_held_out, self.ranks = names, kinds, keep_held_out, ranks
        self.blocks = blocks
        self.finished: dict[str, OutputMoments] = {}
        self._sums: Sums = {}
        self._batches: dict[tuple[int, int], list[tuple[int, slice | Tensor]]] = {}
        self._beside: Background | None = None

    def visit(self, found: Sums, name: str, gradient: Tensor, norms: Tensor, first: int) -> None:
        """Add a batch of gradients to sums that lie on their device.

        Args:
            found: Sums of the block so far.
            name: The linear or block.
            gradient: ``[rows, positions, out]``.
            norms: ``[rows, positions]`` float32, their norms.
            first: Number of the first row among all rows.
        """
        if name not in self.names and name not in self.blocks:
            return
        width = gradient.shape[-1]
        if name not in found:
            found[name] = torch.zeros(2, width, width, dtype=torch.float32, device=gradient.device)
        lengths = norms.float()
        roots = torch.where(lengths > 0, lengths.rsqrt(), 0.0)
        for kind, rows in self._rows(first, len(gradient), gradient.device):
            tokens = gradient[rows].flatten(0, 1).contiguous()
            found[name][kind].add_(gram(tokens, roots[rows].flatten()), alpha=len(tokens))

    def _rows(self, first: int, count: int, device: torch.device) -> list[tuple[int, slice | Tensor]]:
        """Rows of a batch by kind: a view of them where they lie together, as that costs a GPU no launch."""
        if (first, count) not in self._batches:
            kinds = self.kinds[first : first + count]
            listed = ((kind, torch.nonzero(kinds == kind)[:, 0]) for kind in (FITTING, HELD_OUT))
            self._batches[first, count] = [(kind, _together(rows, device)) for kind, rows in listed if len(rows)]
        return self._batches[first, count]

    def add(self, found: Sums, last: bool) -> None:
        """Add the sums of a block over some rows to those of the rows before; after the last rows make moments.

        These are made by one rank each, from the sums of all.
        """
        own: Sums = {}
        for position, (name, sums) in enumerate(found.items()):
            known = self._sums.pop(name, None)
            total = sums if known is None else sums.add_(known.to(sums.device))
            if not last:
                self._sums[name] = total.cpu()
                continue
            total = self.ranks.folded(total, position % self.ranks.size, Tensor.add_)
            if total is not None:
                own[name] = total
        # Only now, when nobody waits for what this rank has of the others' layers.
        for name, total in own.items():
            work = partial(self._finish, name, total[0], total[1])
            if total.is_cuda:  # a dozen factors of small matrices, beside which the next block is differentiated
                self._beside = self._beside or Background(total.device)
                self._beside.start(work)
            else:
                work()

    def _finish(self, name: str, fitting: Tensor, held_out: Tensor) -> None:
        if name in self.blocks:
            self.finished[name] = OutputMoments(lower=pack_lower(fitting + held_out).cpu())
        else:
            self.finished[name] = choose_moments(fitting, held_out, self.keep_held_out)

    def collect(self) -> None:
        """Give every rank all moments."""
        if self._beside is not None:
            self._beside.finish()
        for part in self.ranks.everywhere(self.finished):
            self.finished |= part


def _together(rows: Tensor, device: torch.device) -> slice | Tensor:
    """Numbers of rows as a slice where they follow on each other."""
    begin, end = int(rows[0]), int(rows[-1]) + 1
    return slice(begin, end) if end - begin == len(rows) else rows.to(device)
