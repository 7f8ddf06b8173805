"""Learned refinement of a rounded block: offsets, scales and norm gains that bring its output back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hawqtool.rounding.grid import Quantized
from hawqtool.rounding.learned.codebook import FlatFloats
from hawqtool.rounding.learned.fake_quant import FlatLayers, by_kind
from hawqtool.rounding.learned.gumbel import GumbelLayers, SignMomentum, logit_rate, scale_rate
from hawqtool.rounding.learned.training import (
    CHECKS,
    PATIENCE,
    Gain,
    Objective,
    TrainingLog,
    batch_order,
    learn,
    share_gradients,
)
from hawqtool.rounding.spec import InitialRounding
from hawqtool.runtime.ranks import ALONE, Ranks

Learner = Literal["adam", "gumbel"]
"""What refinement learns codes by."""

Forward = Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
"""Output ``[rows, positions, width]`` of the block with weights and gains by name, from the input of a batch."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Args:
        steps: Steps at most.
        seed: Seed of the order of batches.
        latent_rate: First step of the rounding offsets, in codes; all rates fall linearly to zero.
        scale_rate: First relative step of the scales.
        gain_rate: First step of norm gains, relative to their root mean square.
        reach: How far an offset may go, in codes.
        learner: ``adam``: offsets by straight-through gradients; ``gumbel``: annealed choice among codes at most two
            away (see `hawqtool.rounding.learned.gumbel`), with rates of its own and steps by sign for all that is
            learned.
        cap: Most that a token's error counts in a step, in medians of its batch; 0 for no limit (see `output_error`).
        margin: Least distance of an offset from the borders of its cell at the start, in codes.
        damping: λ over the mean diagonal of the metric across outputs, where errors count by one (see `OutputMetric`).
    """

    steps: int
    seed: int = 0
    latent_rate: float = 0.008
    scale_rate: float = 3e-3
    gain_rate: float = 3e-3
    reach: float = 1.0
    learner: Learner = "adam"
    cap: float = 0.0
    margin: float = 0.0
    damping: float = 0.3


@dataclass(frozen=True)
class OutputMetric:
    """What an error e of a token's output y costs the loss: a êᵀ M ê, with ê = e / ‖y‖.

    To second order the loss grows by ½ (g̃ · ê)² with g̃ = g ‖y‖, g the gradient at the output for labels drawn from the
    model. As in rounding, a token's own g̃, known from one draw, gives its importance a = ‖g̃‖, and that of all tokens
    the directions.

    Args:
        across: ``[width, width]`` float32, M: mean of g̃ g̃ᵀ / ‖g̃‖, damped, with trace width.
        importance: ``[rows, positions]`` float32 by batch, a.
    """

    across: Tensor
    importance: Sequence[Tensor]


@dataclass(frozen=True)
class Batches:
    """Inputs of the block and outputs that it should give.

    Args:
        inputs: ``[rows, positions, width]`` by batch.
        targets: The same.
        metric: What errors count by; None where all of a token's and all tokens' count alike.
        ranks: Processes that share the rows of every batch.
    """

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    metric: OutputMetric | None = None
    ranks: Ranks = ALONE

    def error(self, output: Tensor, position: int, cap: float = 0.0) -> Tensor:
        """Error of the output of one of the batches, a scalar (see `output_error`)."""
        target, metric = self.targets[position], self.metric
        if metric is None:
            return output_error(output, target, cap)
        return output_error(output, target, cap, metric.across, metric.importance[position])


@dataclass(frozen=True)
class Refined:
    """What refinement gave.

    Args:
        layers: Codes, scales and zero points by layer.
        gains: Norm gains by name, in their stored dtype.
        log: How it went; errors are relative (see `output_error`).
        seconds: Time that it took.
    """

    layers: dict[str, Quantized]
    gains: dict[str, Tensor]
    log: TrainingLog
    seconds: float


def damped_metric(moments: Tensor, damping: float) -> Tensor:
    """M of `OutputMetric` from second moments ``[width, width]`` float32 and λ; the identity where they are zero."""
    mean = moments.diagonal().mean()
    alone = torch.eye(len(moments), device=moments.device)
    return (moments / mean + damping * alone) / (1 + damping) if bool(mean > 0) else alone


def output_error(
    output: Tensor,
    target: Tensor,
    cap: float = 0.0,
    across: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Mean over tokens of the squared error over the squared target: a scalar.

    Every token counts the same: those with huge hidden states, which norms scale away, would drown the others.

    Args:
        output: ``[rows, positions, width]``, of any floating dtype.
        target: What it should be.
        cap: Most that a token counts, in medians of all tokens, after SignRoundV2's mask of the largest errors; 0 for
            no limit.
        across: ``[width, width]`` float32, metric of the errors; None for the identity.
        importance: ``[rows, positions]`` float32, how much each token counts; None where all count alike.
    """
    goal = target.float()
    # In bf16 the square of the difference would lose what matters.
    error = output.float() - goal
    squared = (error.square() if across is None else (error @ across) * error).sum(-1)
    relative = squared / goal.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    if importance is not None:
        relative = relative * importance
    return (relative.clamp(max=cap * float(relative.detach().median())) if cap else relative).mean()


def _learnable(initial: Sequence[InitialRounding], schedule: Schedule) -> FlatLayers | GumbelLayers:
    if schedule.learner == "gumbel":
        return GumbelLayers(initial, schedule.steps, schedule.seed)
    kind = FlatLayers if initial[0].quant_format.floats is None else FlatFloats
    return kind(initial, schedule.reach, schedule.margin)


class _State:
    """Everything that is learned of one block."""

    def __init__(
        self,
        initial: Sequence[InitialRounding],
        gains: Mapping[str, tuple[Tensor, torch.dtype]],
        schedule: Schedule,
        dtype: torch.dtype,
    ) -> None:
        self.schedule, self.flats = schedule, [_learnable(some, schedule) for some in by_kind(initial)]
        self.gains = {name: Gain(*found) for name, found in gains.items()}
        self.dtype = dtype

    @property
    def learned(self) -> list[Tensor]:
        flats = [t for flat in self.flats for t in (*flat.latents, flat.log_change)]
        return flats + [gain.change for gain in self.gains.values()]

    def weights(self, differentiable: bool) -> dict[str, Tensor]:
        found = {name: gain.weight(self.dtype, differentiable) for name, gain in self.gains.items()}
        for flat in self.flats:
            found |= flat.weights(self.dtype, differentiable)
        return found

    def optimizer(self) -> torch.optim.Optimizer:
        schedule = self.schedule
        by_sign, steps = schedule.learner == "gumbel", schedule.steps
        scales = scale_rate(steps) if by_sign else schedule.scale_rate
        groups = [
            {
                "params": [latent for flat in self.flats for latent in flat.latents],
                "lr": logit_rate(steps) if by_sign else schedule.latent_rate,
            },
            {"params": [flat.log_change for flat in self.flats], "lr": scales},
            {
                "params": [gain.change for gain in self.gains.values()],
                "lr": scales if by_sign else schedule.gain_rate,
            },
        ]
        groups = [group for group in groups if group["params"]]
        return SignMomentum(groups) if by_sign else torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)

    def collect(self) -> None:
        for flat in self.flats:
            flat.collect()
        for gain in self.gains.values():
            gain.collect()

    def confine(self) -> None:
        for flat in self.flats:
            flat.confine()


def refine(
    initial: Sequence[InitialRounding],
    gains: Mapping[str, tuple[Tensor, torch.dtype]],
    forward: Forward,
    fitting: Batches,
    held_out: Batches,
    schedule: Schedule,
    progress: Callable[[int], None] = lambda _: None,
) -> Refined:
    """Learn what brings the block's outputs closest to the targets; the best held-out error is kept.

    Args:
        initial: The block's rounded layers.
        gains: Norm gains of the block with the dtype in which they are stored.
        forward: Runs the block.
        fitting: What is learned from.
        held_out: What is judged on; batch numbers go on behind those of ``fitting``.
        schedule: Steps and rates.
        progress: Called with the number of steps done.

    Returns:
        The start itself where nothing was better.

    Raises:
        NumericalError: If the start's error is not finite.
    """
    start = time.perf_counter()
    state = _State(initial, gains, schedule, fitting.inputs[0].dtype)
    optimizer = state.optimizer()
    log = learn(
        Objective(
            f"{initial[0].name}: the rounded block",
            lambda batch: _learn(state, forward, fitting, batch, optimizer),
            lambda: _error(state, forward, held_out, len(fitting.inputs)),
            fitting.ranks,
        ),
        state.learned,
        optimizer,
        batch_order(len(fitting.inputs), schedule.steps, schedule.seed),
        progress,
        patience=CHECKS if schedule.learner == "gumbel" else PATIENCE,  # noise hides what is learned until it is gone
    )
    with torch.no_grad():
        layers = {name: found for flat in state.flats for name, found in flat.rounded().items()}
        final = {name: gain.stored() for name, gain in state.gains.items()}
    return Refined(layers, final, log, time.perf_counter() - start)


def _learn(state: _State, forward: Forward, fitting: Batches, batch: int, optimizer: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        output = forward(state.weights(True), fitting.inputs[batch], batch)
        fitting.error(output, batch, state.schedule.cap).backward()
    with torch.no_grad():
        state.collect()
        share_gradients(state.learned, fitting.ranks, len(fitting.inputs[batch]))
        optimizer.step()
        state.confine()


def _error(state: _State, forward: Forward, held_out: Batches, first: int) -> float:
    """Mean error over the held-out tokens, those of all ranks."""
    with torch.no_grad():
        weights = state.weights(False)
        total = torch.zeros((), dtype=torch.float64, device=held_out.inputs[0].device)
        tokens = 0
        for number, x in enumerate(held_out.inputs):
            count = held_out.targets[number].shape[:-1].numel()
            total += held_out.error(forward(weights, x, first + number), number).double() * count
            tokens += count
    shares = held_out.ranks.everywhere((float(total), tokens))
    return sum(share for share, _ in shares) / sum(count for _, count in shares)
