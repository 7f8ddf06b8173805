"""Distillation: scales, norm gains and codes of a whole rounded model are learned, so that its outputs come back.

Without codes this is the end-to-end stage of EfficientQAT (Chen et al., 2024), which learns step sizes on the loss on
text, with the divergence from the original model in the loss's place and norm gains beside the scales. Codes are
learned as in refinement, straight through the rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hawqtool.rounding.grid import Quantized
from hawqtool.rounding.learned.block import Forward
from hawqtool.rounding.learned.fake_quant import FlatLayers, FlatScales, by_kind
from hawqtool.rounding.learned.training import Gain, Objective, TrainingLog, batch_order, learn, share_gradients
from hawqtool.rounding.spec import InitialRounding
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.store import NOTHING_SAVED, Saved


@dataclass(frozen=True)
class DistillSchedule:
    """How long and how fast.

    Args:
        steps: Steps at most.
        seed: Seed of the order of batches.
        scale_rate: First relative step of the scales; rates fall linearly to zero.
        gain_rate: First step of norm gains, relative to their root mean square.
        latent_rate: First step of the rounding offsets, in codes; with 0 all codes stay.
        reach: How far an offset may go, in codes.
        margin: Least distance of an offset from the borders of its cell at the start, in codes.
    """

    steps: int
    seed: int = 0
    scale_rate: float = 1e-3
    gain_rate: float = 1e-3
    latent_rate: float = 0.0
    reach: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class TrainableBlock:
    """One block of the model.

    Args:
        layers: Rounded layers.
        gains: Norm gains by name, with the dtype in which they are stored.
        forward: Output of the block with weights and gains by name, from the input of a batch.
    """

    layers: Sequence[InitialRounding]
    gains: Mapping[str, tuple[Tensor, torch.dtype]]
    forward: Forward


class Comparison(Protocol):
    """Compares the last block's output of one batch, ``[rows, positions, width]``, with the original model's."""

    def divergence(self, hidden: Tensor) -> Tensor:
        """Divergence of every row, ``[rows]`` float64."""

    def gradient(self, hidden: Tensor) -> Tensor:
        """Gradient of the mean over the rows at the output, of its shape and dtype."""


@dataclass(frozen=True)
class Distilled:
    """What distillation gave.

    Args:
        layers: Codes, scales and zero points by layer.
        gains: By block, norm gains by name, in their stored dtype.
        log: How it went; errors are mean divergences of the held-out rows.
        seconds: Time that it took.
    """

    layers: dict[str, Quantized]
    gains: list[dict[str, Tensor]]
    log: TrainingLog
    seconds: float


class _Learner:
    """What is learned of one block."""

    def __init__(self, block: TrainableBlock, dtype: torch.dtype, schedule: DistillSchedule) -> None:
        kinds = by_kind(block.layers)
        self.flats: list[FlatLayers] | list[FlatScales]
        if schedule.latent_rate:
            self.flats = [FlatLayers(kind, schedule.reach, schedule.margin) for kind in kinds]
        else:
            self.flats = [FlatScales(kind) for kind in kinds]
        self.gains = {name: Gain(*found) for name, found in block.gains.items()}
        self.forward, self.dtype = block.forward, dtype

    def run(self, hidden: Tensor, batch: int, differentiable: bool = False) -> Tensor:
        weights = {name: gain.weight(self.dtype, differentiable) for name, gain in self.gains.items()}
        for flat in self.flats:
            weights |= flat.weights(self.dtype, differentiable)
        return self.forward(weights, hidden, batch)

    def back(self, hidden: Tensor, batch: int, gradient: Tensor) -> Tensor:
        """Run the block again for its gradients; the one at its input."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            self.run(leaf, batch, differentiable=True).backward(gradient)
        for flat in self.flats:
            flat.collect()
        for gain in self.gains.values():
            gain.collect()
        assert leaf.grad is not None  # every block's output depends on its input
        return leaf.grad


@dataclass(frozen=True)
class DistillRows:
    """Rows that are learned from and judged on, those of this rank.

    Args:
        inputs: First block's input ``[rows, positions, width]`` by batch.
        fitting: Number of leading batches to learn from, the same in all ranks; the others are held out.
        comparisons: With the original's outputs, by batch.
        ranks: Processes that share the rows of every batch.
    """

    inputs: Sequence[Tensor]
    fitting: int
    comparisons: Sequence[Comparison]
    ranks: Ranks = ALONE


def distill(
    trainable_blocks: Sequence[TrainableBlock],
    rows: DistillRows,
    schedule: DistillSchedule,
    progress: Callable[[int], None] = lambda _: None,
    saved: Saved = NOTHING_SAVED,
) -> Distilled:
    """Learn what brings the model's outputs closest to the original's on rows not learned from.

    One block's gradients are in memory at a time: the input of every block is kept, and each runs again backwards.

    Args:
        trainable_blocks: The blocks in order.
        rows: What is learned from and judged on.
        schedule: Steps and rates.
        progress: Called with the number of steps done.
        saved: Keeps where the learning is; one of equal arguments that was cut is gone on with, equal to the bit.

    Returns:
        The start itself where nothing was better.

    Raises:
        NumericalError: If the start's outputs are not finite.
    """
    begun = time.perf_counter()
    inputs, fitting, comparisons, ranks = rows.inputs, rows.fitting, rows.comparisons, rows.ranks
    learners = [_Learner(block, inputs[0].dtype, schedule) for block in trainable_blocks]
    flats = [flat for learner in learners for flat in learner.flats]
    groups: list[dict[str, Any]] = [
        {"params": [latent for flat in flats for latent in flat.latents], "lr": schedule.latent_rate},
        {"params": [flat.log_change for flat in flats], "lr": schedule.scale_rate},
        {"params": [gain.change for learner in learners for gain in learner.gains.values()], "lr": schedule.gain_rate},
    ]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)
    judged = sum(len(batch) for batch in inputs[fitting:])

    def error() -> float:
        held_out = range(fitting, len(inputs))
        own = math.fsum(_divergence(learners, inputs[b], b, comparisons[b]) for b in held_out)
        shares = ranks.everywhere((own, judged))
        return sum(share for share, _ in shares) / sum(count for _, count in shares)

    def learn_from(batch: int) -> None:
        _gradients(learners, inputs[batch], batch, comparisons[batch])
        with torch.no_grad():
            share_gradients(learned, ranks, len(inputs[batch]))
            optimizer.step()
            for flat in flats:
                flat.confine()

    order = batch_order(fitting, schedule.steps, schedule.seed)
    learned = [tensor for group in groups for tensor in group["params"]]
    objective = Objective("the rounded model", learn_from, error, ranks)
    # What was refined before gets worse by the first and largest steps; only small ones, at the end, can bring it back.
    log = learn(objective, learned, optimizer, order, progress, saved, patience=schedule.steps)
    with torch.no_grad():
        layers = {name: found for flat in flats for name, found in flat.rounded().items()}
        final = [{name: gain.stored() for name, gain in learner.gains.items()} for learner in learners]
    return Distilled(layers, final, log, time.perf_counter() - begun)


def _divergence(learners: Sequence[_Learner], hidden: Tensor, batch: int, comparison: Comparison) -> float:
    """Sum over the rows of a batch."""
    with torch.no_grad():
        for learner in learners:
            hidden = learner.run(hidden, batch)
        return sum(comparison.divergence(hidden).tolist())


def _gradients(learners: Sequence[_Learner], hidden: Tensor, batch: int, comparison: Comparison) -> None:
    """Set the gradients of everything that is learned, from one batch."""
    reached = []
    with torch.no_grad():
        for learner in learners:
            reached.append(hidden)
            hidden = learner.run(hidden, batch)
    gradient = comparison.gradient(hidden)
    for learner in reversed(learners):
        gradient = learner.back(reached.pop(), batch, gradient)
