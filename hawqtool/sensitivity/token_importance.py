"""How much each token counts in rounding: by the gradients of the loss at the outputs of the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from copy import copy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.model.block import LoadedBlock
from hawqtool.records import TokenImportance
from hawqtool.runtime.determinism import FixedOrder
from hawqtool.runtime.malloc import release_freed_pages
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.sensitivity.backward import token_powers
from hawqtool.sensitivity.gradient_limit import limited_powers, row_powers
from hawqtool.sensitivity.label_gradients import loss_gradients
from hawqtool.sensitivity.output_moments import OutputMomentSums, Sums
from hawqtool.streaming.block import Activations, advance, check_states
from hawqtool.streaming.offload import OffloadedBatches, total_bytes
from hawqtool.streaming.stream import BLOCKS_AHEAD, ModelStream

EXPONENT = 0.5
"""Power of ‖g‖² that is taken for the importance, hence ‖g‖.

One is what the Fisher matrix asks for, if gradients were known and errors small. But each is known from one draw of the
labels, and a few tokens have most of the power (in some layers of SmolLM2 the first position has 99 % of it), so that
the weighted Gram matrix rests on few tokens. 3 bits, 48 rows of 512 tokens, KL: 0.500 without importance, 0.431 with
exponent 1, 0.414 with ½, 0.419 with 0.35, each for all linears of an input together; 0.402 with ½ for each alone.
"""


_STORED = torch.bfloat16
"""dtype of hidden states between the forward and the reverse sweep, where the model's own is larger."""

_POSITIONS = 128
"""Positions whose logits a CPU holds at a time: few, because little else is in memory here."""


class Portions(NamedTuple):
    """What goes through the model together.

    Args:
        batch_size: Rows per pass.
        room: Bytes of hidden states that may be kept together; those of one batch are in any case. Less room means
            walking blocks again, or reading the weights of all blocks more often; importance does not depend on it.
        ranks: Processes that share the rows; the leader has the result, the others none.
    """

    batch_size: int
    room: int
    ranks: Ranks = ALONE

    def plan(self, state_bytes: int, blocks: int, rows: int, walks_again: bool) -> tuple[int, int]:
        """Rows whose states are kept together, whole batches, and how many blocks lie between states that are kept.

        States between those come from walking these blocks once more, in the reverse sweep (checkpointing, Chen et al.
        2016, 1604.06174): that takes less than reading all weights again for other rows, as long as it helps.

        Args:
            state_bytes: Bytes of the states of a row before one block.
            blocks: Blocks of the model.
            rows: Rows in all.
            walks_again: Whether walking from what is kept gives the same states.
        """
        most = math.isqrt(blocks - 1) + 1 if walks_again else 1
        held = [-(-blocks // spacing) + spacing - 1 for spacing in range(1, most + 1)]  # with those of one stretch
        batches = -(-rows // self.batch_size)
        for spacing, count in enumerate(held, 1):
            if batches * self.batch_size * count * state_bytes <= self.room:
                return batches * self.batch_size, spacing
        count = self.room // (state_bytes * held[-1] * self.batch_size)
        return max(1, count) * self.batch_size, most


class _Stretches:
    """Blocks in the order of both sweeps: forwards, and in reverse, each stretch walked again before it.

    Args:
        blocks: Blocks of the model.
        spacing: Blocks of a stretch: states are kept before the first of each, and before all of the last one.
    """

    def __init__(self, blocks: int, spacing: int) -> None:
        self.blocks, self.spacing = blocks, spacing
        self._last = (blocks - 1) // spacing * spacing

    def keeps(self, index: int) -> bool:
        """Whether the forward sweep keeps the states before a block."""
        return index % self.spacing == 0 or index > self._last

    def again(self, index: int) -> range:
        """Blocks to walk again when the reverse sweep comes to a block, none where its states are there."""
        ends_stretch = index % self.spacing == self.spacing - 1 and index < self._last
        return range(index - self.spacing + 1, index) if ends_stretch else range(0)

    def following(self, index: int) -> list[int]:
        """Blocks whose weights the reverse sweep reads after those of a block."""
        order = [i for later in range(index - 1, index - 3, -1) if later >= 0 for i in (*self.again(later), later)]
        return order[:BLOCKS_AHEAD]


def token_importance(
    stream: ModelStream,
    rows: Tensor,
    portions: Portions,
    seed: int,
    progress: Callable[[int, int], None],
    exponent: float = EXPONENT,
    moments: OutputMomentSums | None = None,
) -> TokenImportance:
    """Importance of the tokens in the Gram matrices behind rounding, ``[rows, positions]`` float32 with mean 1.

    The loss grows by ½ Σ_t (g_t · D x_t)² to second order, g_t being the gradient at a layer's output for labels drawn
    from the model. Compensated rounding makes Σ_t ‖D x_t‖² small; with the importance ‖g_t‖² of every token it makes
    the loss small as far as g_t has no preferred direction. GuidedQuant (arXiv 2505.07004) does so, for groups of
    output channels apart; the exponent and the limit of single rows are ours. Experts, whose tokens change with
    rounding, and an output head have none.

    Args:
        stream: The original model.
        rows: Calibration rows: ``[rows, seq_len]`` tokens, or images.
        portions: Rows and memory of a pass.
        seed: Seed of the labels.
        progress: Called with blocks done and blocks in all, over both directions and all rows.
        exponent: Power of ‖g‖².
        moments: Takes the second moments of the gradients on the way.

    Raises:
        NumericalError: If outputs or gradients are not finite.
    """
    ranks, share = portions.ranks, portions.ranks.share(len(rows))
    generator = torch.Generator(stream.device).manual_seed(ranks.seed(seed))
    order, powers, starts = FixedOrder(stream.device), dict[str, list[Tensor]](), list[Tensor]()
    blocks, batch_size = stream.structure.blocks, portions.batch_size
    parts, stretches = _planned(stream, rows[share], portions)
    total, done, first = 2 * len(blocks) * len(parts), 0, share.start
    for part in parts:
        seen, stored = stream.embed(part, batch_size), _Stored()
        for index in _forward(stream, seen, stored, stretches):
            progress(done + index + 1, total)
        release_freed_pages()  # logits need memory in other sizes than blocks do
        gradients, _ = loss_gradients(stream, part.split(batch_size), seen.hidden, generator, _POSITIONS)
        starts.append(row_powers(gradients))
        stream.release_ends()
        release_freed_pages()
        for spec in reversed(blocks):
            outputs = seen.hidden
            _walk_again(stream, seen, stored, stretches.again(spec.index))
            seen.hidden = stored.pop(spec.index)
            with stream.block(spec.index, stretches.following(spec.index)) as block:
                found, gradients, sums = order.run(partial(_reversed, block, seen, outputs, gradients, moments, first))
            check_states(gradients, f"the gradient at the input of block {spec.name}")
            if moments:
                moments.add(sums, last=part is parts[-1])
            for name, power in found.items():
                powers.setdefault(name, []).append(power.cpu())
            progress(done + 2 * len(blocks) - spec.index, total)
        first, done = first + len(part), done + 2 * len(blocks)
    if moments:
        moments.collect()
    return _joined(ranks, powers, starts, exponent)


def _planned(stream: ModelStream, rows: Tensor, portions: Portions) -> tuple[Sequence[Tensor], _Stretches]:
    """Rows whose states are kept together, and before which blocks they are."""
    # Where states are rounded to be kept, walking on from them gives others.
    walks_again, blocks = stream.dtype.itemsize <= _STORED.itemsize, len(stream.structure.blocks)
    together, spacing = portions.plan(_state_bytes(stream, rows[:1]), blocks, len(rows), walks_again)
    return rows.split(together), _Stretches(blocks, spacing)


_Stored = dict[int, MutableSequence[Tensor]]
"""States before blocks, by their numbers."""


def _forward(stream: ModelStream, seen: Activations, stored: _Stored, stretches: _Stretches) -> Iterator[int]:
    """Walk the model, keeping states; gives the number of each block once they have passed it."""
    for spec in stream.structure.blocks:
        if stretches.keeps(spec.index):
            stored[spec.index] = _kept(stream, seen.hidden)
        with stream.block(spec.index) as block:
            advance(block, seen)
        yield spec.index


def _walk_again(stream: ModelStream, seen: Activations, stored: _Stored, again: range) -> None:
    """Keep the states behind some blocks too, from those before the first of them."""
    for index in again:
        seen.hidden = copy(stored[index])
        with stream.block(index, range(index + 1, index + 1 + BLOCKS_AHEAD)[: again.stop - index]) as block:
            advance(block, seen)
        stored[index + 1] = seen.hidden


def _reversed(
    block: LoadedBlock,
    seen: Activations,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: OutputMomentSums | None,
    first: int,
) -> tuple[dict[str, Tensor], list[Tensor], Sums]:
    """Powers, gradients at the block's input (see `token_powers`) and moments; may be begun twice."""
    sums: Sums = {}
    if moments is None:
        return *token_powers(block, seen, gradients), sums

    def visit(name: str, gradient: Tensor, norms: Tensor, row: int) -> None:
        moments.visit(sums, name, gradient, norms, first + row)

    powers, before = token_powers(block, seen, gradients, visit)
    if block.spec.name in moments.blocks:
        powers[block.spec.name] = _relative_powers(outputs, gradients, partial(visit, block.spec.name))
    return powers, before, sums


def _relative_powers(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], visit: Callable[[Tensor, Tensor, int], None]
) -> Tensor:
    """‖g‖²‖y‖² of every token at a block's output y, ``[rows, positions]`` float32: of errors relative to ‖y‖.

    Norms scale the hidden states, so that an error costs what it is to their size, which differs a thousandfold.
    """
    powers, first = [], 0
    for output, gradient in zip(outputs, gradients, strict=True):
        sizes = torch.linalg.vector_norm(output.to(gradient.device), dim=-1, dtype=torch.float32)
        wide = gradient.float() if gradient.dtype == torch.float16 else gradient  # sizes are out of its range
        relative = wide * sizes[..., None].to(wide.dtype)
        norms = torch.linalg.vector_norm(relative, dim=-1, dtype=torch.float32)
        visit(relative, norms, first)
        powers.append(norms.square())
        first += len(output)
    return torch.cat(powers)


def _joined(ranks: Ranks, powers: dict[str, list[Tensor]], starts: list[Tensor], exponent: float) -> TokenImportance:
    """Importance of all rows for the leader, none for the others, from what each rank has of its own.

    Args:
        ranks: The processes.
        powers: ‖g‖² by layer, ``[rows, positions]`` per part.
        starts: That at the last block's output, ``[rows]`` per part.
        exponent: Power of ‖g‖².
    """
    own = {name: torch.cat(found) for name, found in powers.items()}, torch.cat(starts)
    shares = ranks.to_owner(own, 0)
    if shares is None:
        return {}
    start = torch.cat([of_share for _, of_share in shares])
    joined = {name: torch.cat([by_name[name] for by_name, _ in shares]) for name in own[0]}
    return {name: _importance(power, start, exponent) for name, power in joined.items()}


def _state_bytes(stream: ModelStream, row: Tensor) -> int:
    """Bytes that are kept of one row before a block."""
    return int(total_bytes(_kept(stream, stream.embed(row, 1).hidden)) * stream.state_growth(row))


def _kept(stream: ModelStream, hidden: MutableSequence[Tensor]) -> MutableSequence[Tensor]:
    """Hidden states in two bytes a number: what that loses is far below the noise of labels that are drawn once."""
    if stream.dtype.itemsize <= _STORED.itemsize:
        return copy(hidden)
    kept: MutableSequence[Tensor] = [] if stream.offload is None else OffloadedBatches(stream.offload)
    for states in hidden:
        kept.append(states.to(_STORED))
    return kept


def _importance(power: Tensor, start: Tensor, exponent: float) -> Tensor:
    """Importance with mean 1 from ``[rows, positions]`` float32; all alike where no gradient arrives at all.

    Args:
        power: ``[rows, positions]``, ‖g‖² of every token at the layer's output.
        start: ``[rows]``, ‖g‖² at the last block's output, from where growth counts (see `GRADIENT_LIMIT`).
        exponent: Power of ‖g‖².
    """
    importance = limited_powers(power, start).double().pow(exponent)
    mean = importance.mean()
    return (importance / mean if mean > 0 else torch.ones_like(importance)).float()
