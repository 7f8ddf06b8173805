"""Distillation: scales and norm gains of a whole rounded model are learned, so that its outputs come back.

Codes stay. This is the end-to-end stage of EfficientQAT (Chen et al., 2024), which learns step sizes on the loss on
text, with the divergence from the original model in the loss's place and norm gains beside the scales.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.rounding.fake import MAX_SCALE_CHANGE
from hawqtool.rounding.grid import Quantized
from hawqtool.rounding.learning import Course, Gain, batch_order, learn
from hawqtool.rounding.refine import Forward


@dataclass(frozen=True)
class DistillSchedule:
    """How long and how fast.

    Args:
        steps: Steps at most.
        seed: Seed of the order of batches.
        scale_rate: First relative step of the scales; rates fall linearly to zero.
        gain_rate: First step of norm gains, relative to their root mean square.
    """

    steps: int
    seed: int = 0
    scale_rate: float = 1e-3
    gain_rate: float = 1e-3


@dataclass(frozen=True)
class Piece:
    """One block of the model.

    Args:
        layers: Rounded layers by name.
        gains: Norm gains by name, with the dtype in which they are stored.
        forward: Output of the block with weights and gains by name, from the input of a batch.
    """

    layers: Mapping[str, Quantized]
    gains: Mapping[str, tuple[Tensor, torch.dtype]]
    forward: Forward


class Judge(Protocol):
    """Compares the last block's output of a batch, ``[rows, positions, width]``, with the original model's."""

    def divergence(self, hidden: Tensor, batch: int) -> float:
        """Sum over the rows of their divergence."""

    def gradient(self, hidden: Tensor, batch: int) -> Tensor:
        """Gradient of that sum over the number of rows at the output, of its shape and dtype."""


@dataclass(frozen=True)
class Distilled:
    """What distillation gave.

    Args:
        scales: ``[out, groups]`` by layer, in the stored dtype.
        gains: By piece, norm gains by name, in their stored dtype.
        course: How it went; errors are mean divergences of the held-out rows.
        seconds: Time that it took.
    """

    scales: dict[str, Tensor]
    gains: list[dict[str, Tensor]]
    course: Course
    seconds: float


class FlatScales:
    """Layers whose groups have one width and whose scales have one dtype; their codes are fixed.

    Args:
        layers: Rounded layers by name.

    Attributes:
        log_change: ``[groups, 1]`` float32, logarithm of scale over starting scale.
    """

    def __init__(self, layers: Mapping[str, Quantized]) -> None:
        self.layers = layers
        first = next(iter(layers.values()))
        width = first.codes.shape[1] // first.scales.shape[1]
        self.stored_dtype = first.scales.dtype
        self.start = torch.cat([found.scales.float().view(-1, 1) for found in layers.values()])
        self.levels = torch.cat([_levels(found, width) for found in layers.values()])
        self.log_change = torch.zeros_like(self.start)
        self._leaf = self.start

    @property
    def scale(self) -> Tensor:
        """``[groups, 1]`` float32."""
        return self.start * self.log_change.exp()

    def weights(self, dtype: torch.dtype, differentiable: bool) -> dict[str, Tensor]:
        """Weights ``[out, in]`` of every layer in a dtype, as loaders compute them."""
        value = self.levels.to(self.stored_dtype) * self.scale.to(self.stored_dtype)
        value = value.to(dtype).requires_grad_(differentiable)
        if differentiable:  # otherwise the weights of a whole model would stay in memory
            self._leaf = value
        parts = value.split([found.scales.numel() for found in self.layers.values()])
        return {name: part.view(self.layers[name].codes.shape) for name, part in zip(self.layers, parts, strict=True)}

    def collect(self) -> None:
        """Set the gradient of `log_change` from that of the latest weights, and let both go.

        The weight is level times scale, so ∂L/∂log s = s Σ level · ∂L/∂w, exact but for the rounding of s as it is
        stored, which is taken for the identity.
        """
        if self._leaf.grad is not None:
            self.log_change.grad = (self._leaf.grad.float() * self.levels).sum(-1, keepdim=True) * self.scale
        self._leaf = self.start

    def stored(self) -> dict[str, Tensor]:
        """Scales ``[out, groups]`` of every layer as they are now."""
        parts = self.scale.to(self.stored_dtype).split([found.scales.numel() for found in self.layers.values()])
        return {n: part.reshape(self.layers[n].scales.shape) for n, part in zip(self.layers, parts, strict=True)}


def _levels(rounded: Quantized, width: int) -> Tensor:
    """Codes less zero points, ``[groups, width]`` in the smallest integers that hold them."""
    codes = rounded.codes.reshape(-1, width)
    return codes if rounded.zeros is None else codes.short() - rounded.zeros.short().view(-1, 1)


class _Learner:
    """What is learned of one piece."""

    def __init__(self, piece: Piece, dtype: torch.dtype) -> None:
        kinds: dict[tuple[int, torch.dtype, bool], dict[str, Quantized]] = {}
        for name, found in piece.layers.items():
            kind = found.codes.shape[1] // found.scales.shape[1], found.scales.dtype, found.zeros is None
            kinds.setdefault(kind, {})[name] = found
        self.flats = [FlatScales(layers) for layers in kinds.values()]
        self.gains = {name: Gain(*found) for name, found in piece.gains.items()}
        self.forward, self.dtype = piece.forward, dtype

    def run(self, hidden: Tensor, batch: int, differentiable: bool = False) -> Tensor:
        weights = {name: gain.weight(self.dtype, differentiable) for name, gain in self.gains.items()}
        for flat in self.flats:
            weights |= flat.weights(self.dtype, differentiable)
        return self.forward(weights, hidden, batch)

    def back(self, hidden: Tensor, batch: int, gradient: Tensor) -> Tensor:
        """Run the piece again for its gradients; the one at its input."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            self.run(leaf, batch, differentiable=True).backward(gradient)
        for flat in self.flats:
            flat.collect()
        for gain in self.gains.values():
            gain.collect()
        assert leaf.grad is not None  # every block's output depends on its input
        return leaf.grad


def distill(
    pieces: Sequence[Piece],
    inputs: Sequence[Tensor],
    fitting: int,
    judge: Judge,
    schedule: DistillSchedule,
    progress: Callable[[int], None] = lambda _: None,
    saved: Saved = NOTHING_SAVED,
) -> Distilled:
    """Learn the scales and gains that bring the model's outputs closest to the original's on rows not learned from.

    One block's gradients are in memory at a time: the input of every block is kept, and each runs again backwards.

    Args:
        pieces: The blocks in order.
        inputs: First block's input ``[rows, positions, width]`` by batch.
        fitting: Number of leading batches to learn from; the others are held out.
        judge: Compares outputs.
        schedule: Steps and rates.
        progress: Called with the number of steps done.
        saved: Keeps where the learning is; one of equal arguments that was cut is gone on with, equal to the bit.

    Returns:
        The start itself where nothing was better.

    Raises:
        NumericalError: If the start's outputs are not finite.
    """
    begun = time.perf_counter()
    learners = [_Learner(piece, inputs[0].dtype) for piece in pieces]
    flats = [flat.log_change for learner in learners for flat in learner.flats]
    gains = [gain.change for learner in learners for gain in learner.gains.values()]
    groups = [{"params": flats, "lr": schedule.scale_rate}, {"params": gains, "lr": schedule.gain_rate}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)
    rows = sum(len(batch) for batch in inputs[fitting:])

    def error() -> float:
        return math.fsum(_divergence(learners, inputs[b], b, judge) for b in range(fitting, len(inputs))) / rows

    def step(batch: int) -> None:
        _gradients(learners, inputs[batch], batch, judge)
        with torch.no_grad():
            optimizer.step()
            for change in flats:
                change.clamp_(-MAX_SCALE_CHANGE, MAX_SCALE_CHANGE)

    order = batch_order(fitting, schedule.steps, schedule.seed)
    course = learn("the rounded model", [*flats, *gains], optimizer, order, step, error, progress, saved)
    with torch.no_grad():
        scales: dict[str, Tensor] = {}
        for flat in (flat for learner in learners for flat in learner.flats):
            scales |= flat.stored()
        final = [{name: gain.stored() for name, gain in learner.gains.items()} for learner in learners]
    return Distilled(scales, final, course, time.perf_counter() - begun)


def _divergence(learners: Sequence[_Learner], hidden: Tensor, batch: int, judge: Judge) -> float:
    with torch.no_grad():
        for learner in learners:
            hidden = learner.run(hidden, batch)
        return judge.divergence(hidden, batch)


def _gradients(learners: Sequence[_Learner], hidden: Tensor, batch: int, judge: Judge) -> None:
    """Set the gradients of everything that is learned, from one batch."""
    reached = []
    with torch.no_grad():
        for learner in learners:
            reached.append(hidden)
            hidden = learner.run(hidden, batch)
    gradient = judge.gradient(hidden, batch)
    for learner in reversed(learners):
        gradient = learner.back(reached.pop(), batch, gradient)
