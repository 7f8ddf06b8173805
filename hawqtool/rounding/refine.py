"""Learned refinement of a rounded block: offsets, scales and norm gains that bring its output back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.rounding.fake import FlatLayers, Start, flatten_layers
from hawqtool.rounding.grid import Quantized

Forward = Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
"""Output ``[rows, positions, width]`` of the block with weights and gains by name, from the input of a batch."""

CHECKS = 10
"""How often the held-out error is looked at."""

PATIENCE = 6
"""Checks in a row without a better held-out error that end the refinement."""


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
    """

    steps: int
    seed: int = 0
    latent_rate: float = 0.008
    scale_rate: float = 3e-3
    gain_rate: float = 3e-3
    reach: float = 1.0


@dataclass(frozen=True)
class Batches:
    """Inputs of the block and outputs that it should give, ``[rows, positions, width]`` each by batch."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]


@dataclass(frozen=True)
class Refined:
    """What refinement gave.

    Args:
        layers: Codes, scales and zero points by layer.
        gains: Norm gains by name, in their stored dtype.
        before: Relative held-out error at the start.
        after: The same at the end; never more.
        best_step: Step that is kept; 0 is the start.
        steps: Steps that were done.
        seconds: Time that it took.
    """

    layers: dict[str, Quantized]
    gains: dict[str, Tensor]
    before: float
    after: float
    best_step: int
    steps: int
    seconds: float


def output_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error over the squared target: a scalar.

    Every token counts the same: those with huge hidden states, which norms scale away, would drown the others.
    """
    goal = target.float()
    # In bf16 the square of the difference would lose what matters.
    error = (output.float() - goal).square().sum(-1)
    return (error / goal.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


class _Gain:
    """A norm gain: start plus its root mean square times what is learned."""

    def __init__(self, start: Tensor, stored_dtype: torch.dtype) -> None:
        self.start, self.stored_dtype = start.float(), stored_dtype
        self.size = self.start.square().mean().sqrt().clamp_min(1e-2)
        self.change = torch.zeros_like(self.start)
        self.leaf = self.start

    def stored(self) -> Tensor:
        return (self.start + self.size * self.change).to(self.stored_dtype)

    def weight(self, dtype: torch.dtype, differentiable: bool) -> Tensor:
        self.leaf = self.stored().to(dtype).requires_grad_(differentiable)
        return self.leaf

    def collect(self) -> None:
        if self.leaf.grad is not None:
            self.change.grad = self.leaf.grad.float() * self.size


class _State:
    """Everything that is learned of one block."""

    def __init__(
        self, starts: Sequence[Start], gains: Mapping[str, tuple[Tensor, torch.dtype]], reach: float, dtype: torch.dtype
    ) -> None:
        self.flats: list[FlatLayers] = flatten_layers(starts, reach)
        self.gains = {name: _Gain(*found) for name, found in gains.items()}
        self.dtype = dtype

    @property
    def learned(self) -> list[Tensor]:
        flats = [t for flat in self.flats for t in (flat.latent, flat.log_change)]
        return flats + [gain.change for gain in self.gains.values()]

    def weights(self, differentiable: bool) -> dict[str, Tensor]:
        found = {name: gain.weight(self.dtype, differentiable) for name, gain in self.gains.items()}
        for flat in self.flats:
            found |= flat.weights(self.dtype, differentiable)
        return found

    def optimizer(self, schedule: Schedule) -> torch.optim.Optimizer:
        groups = [
            {"params": [flat.latent for flat in self.flats], "lr": schedule.latent_rate},
            {"params": [flat.log_change for flat in self.flats], "lr": schedule.scale_rate},
            {"params": [gain.change for gain in self.gains.values()], "lr": schedule.gain_rate},
        ]
        return torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)

    def collect(self) -> None:
        for flat in self.flats:
            flat.collect()
        for gain in self.gains.values():
            gain.collect()

    def confine(self) -> None:
        for flat in self.flats:
            flat.confine()


def refine(
    starts: Sequence[Start],
    gains: Mapping[str, tuple[Tensor, torch.dtype]],
    forward: Forward,
    fitting: Batches,
    held_out: Batches,
    schedule: Schedule,
    progress: Callable[[int], None] = lambda _: None,
) -> Refined:
    """Learn what brings the block's outputs closest to the targets; the best held-out error is kept.

    Args:
        starts: The block's rounded layers.
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
    state = _State(starts, gains, schedule.reach, fitting.inputs[0].dtype)
    before = best = _error(state, forward, held_out, len(fitting.inputs))
    if not math.isfinite(before):
        raise NumericalError(
            f"{starts[0].name}: the rounded block gives outputs that are NaN or Inf; check its weights"
        )
    kept, best_step, step, idle = [t.clone() for t in state.learned], 0, 0, 0
    optimizer = state.optimizer(schedule)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / max(schedule.steps, 1))
    interval = max(1, -(-schedule.steps // CHECKS))
    order = _batch_order(len(fitting.inputs), schedule)
    while step < schedule.steps and idle < PATIENCE:
        _learn(state, forward, fitting, order[step], optimizer)
        decay.step()
        step += 1
        if step % interval == 0 or step == schedule.steps:
            error = _error(state, forward, held_out, len(fitting.inputs))
            idle += 1
            if error < best:
                best, best_step, idle = error, step, 0
                kept = [t.clone() for t in state.learned]
            progress(step)
    with torch.no_grad():
        for tensor, value in zip(state.learned, kept, strict=True):
            tensor.copy_(value)
        layers = {name: found for flat in state.flats for name, found in flat.rounded().items()}
        final = {name: gain.stored() for name, gain in state.gains.items()}
    return Refined(layers, final, before, best, best_step, step, time.perf_counter() - start)


def _batch_order(count: int, schedule: Schedule) -> list[int]:
    """Batch of every step: all of them, shuffled, before any comes again."""
    generator = torch.Generator().manual_seed(schedule.seed)
    epochs = -(-schedule.steps // count)
    return [int(b) for _ in range(epochs) for b in torch.randperm(count, generator=generator)]


def _learn(state: _State, forward: Forward, fitting: Batches, batch: int, optimizer: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        output = forward(state.weights(True), fitting.inputs[batch], batch)
        output_error(output, fitting.targets[batch]).backward()
    with torch.no_grad():
        state.collect()
        optimizer.step()
        state.confine()


def _error(state: _State, forward: Forward, held_out: Batches, first: int) -> float:
    """Mean error over the held-out tokens."""
    with torch.no_grad():
        weights = state.weights(False)
        total = torch.zeros((), dtype=torch.float64, device=held_out.inputs[0].device)
        tokens = 0
        for number, (x, y) in enumerate(zip(held_out.inputs, held_out.targets, strict=True)):
            count = y.shape[:-1].numel()
            total += output_error(forward(weights, x, first + number), y).double() * count
            tokens += count
    return float(total) / tokens
