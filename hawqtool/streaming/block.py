"""Hidden states between blocks: how a block advances them, and whether they are finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.model.block import BlockCall, LoadedBlock
from hawqtool.records import TokenImportance
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.stage_timer import UNRECORDED, Recorder
from hawqtool.streaming.resume_points import States


@dataclass
class Activations:
    """Hidden states between blocks.

    Args:
        hidden: One ``[rows, positions, width]`` tensor per batch, replaced as the walk goes on.
        calls: Per batch and block, the other arguments of the block's call (masks, rotary tables).
        original: The original model's hidden states of the same rows, beside those of a quantized prefix; None where
            nothing needs them.
        held_out: Whether statistics keep some rows apart too, for settings to be chosen on.
        recorder: Takes note of forward passes and Gram matrices.
        importance: How much each token of all rows counts in statistics; None where all count alike.
        ranks: Processes that share the rows of a walk.
        first_row: Number of the first of these rows among those of all ranks.
        at_outputs: Whether the drift is wanted at the outputs of linears that are alone with their statistics, where
            they are few.
    """

    hidden: MutableSequence[Tensor]
    calls: list[list[BlockCall]]
    original: MutableSequence[Tensor] | None = None
    held_out: bool = False
    recorder: Recorder = UNRECORDED
    importance: TokenImportance | None = None
    ranks: Ranks = ALONE
    first_row: int = 0
    at_outputs: bool = False

    @property
    def states(self) -> States:
        """The hidden states by name."""
        return {"hidden": self.hidden} | ({} if self.original is None else {"original": self.original})


def advance(block: LoadedBlock, activations: Activations) -> None:
    """Replace the hidden states by the block's output, batch by batch.

    Raises:
        NumericalError: If a value is NaN or Inf; names the block.
    """
    with torch.no_grad(), activations.recorder.stage("forward"):
        limits = []
        for position, hidden in enumerate(activations.hidden):
            output = block.run(hidden, activations.calls[position][block.spec.index])
            limits.append(extremes(output))
            activations.hidden[position] = output
        check_extremes(limits, f"the output of block {block.spec.name}")


def extremes(state: Tensor) -> Tensor:
    """Least and largest value, ``[2]``, on the device: NaN where there is one; zeros where there are no values."""
    return torch.stack(torch.aminmax(state.detach())) if state.numel() else state.new_zeros(2)


def check_states(states: Iterable[Tensor], what: str) -> None:
    """Check that hidden states or gradients are finite.

    Raises:
        NumericalError: Naming ``what`` holds NaN or Inf.
    """
    check_extremes([extremes(state) for state in states], what)


def check_extremes(limits: Sequence[Tensor], what: str) -> None:
    """Check that the `extremes` of some tensors are finite; for tensors that are not to be read once more.

    Raises:
        NumericalError: Naming ``what`` holds NaN or Inf.
    """
    # Brought to the host together: on a GPU each number fetched alone would wait for all work before it.
    if not bool(torch.stack(list(limits)).isfinite().all()):
        raise NumericalError(
            f"{what} holds NaN or Inf, expected finite values: the checkpoint is damaged, or {limits[0].dtype} is too "
            "narrow for it; check the original model's own output"
        )


def each_row(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Hidden states row by row, one batch in memory at a time."""
    return (state for part in batches for state in part)
