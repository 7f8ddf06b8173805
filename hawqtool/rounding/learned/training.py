"""What refinement and distillation share: the order of batches, norm gains, and keeping the best that was seen."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.runtime.determinism import FixedOrder
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.store import BYTES_PER_SECOND, NOTHING_SAVED, Saved

# cuBLAS has a fixed order with workspaces of its own only, and reads this when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


CHECKS = 10
"""How often the held-out error is looked at, at least."""

MOST_STEPS = 64
"""Steps after which it is looked at in any case, so that long learning does not overshoot its best."""

PATIENCE = 6
"""Checks in a row without a better held-out error that end the learning."""


_STATE = "standing"


@dataclass(frozen=True)
class TrainingLog:
    """How the learning went.

    Args:
        before: Held-out error at the start.
        after: The same at the end; never more.
        best_step: Step that is kept; 0 is the start.
        steps: Steps that were done.
        reproducible: Whether the same seed gives the same on the same device, see `FixedOrder`.
    """

    before: float
    after: float
    best_step: int
    steps: int
    reproducible: bool

    @property
    def record(self) -> dict[str, Any]:
        """What reports say of it."""
        errors = {"error_before": self.before, "error_after": self.after}
        return errors | {"best_step": self.best_step, "steps": self.steps, "reproducible": self.reproducible}


@dataclass
class TrainingState:
    """Where the learning is: steps done, checks without a better error, and what was best."""

    before: float
    best: float
    best_step: int
    done: int
    idle: int


@dataclass(frozen=True)
class Objective:
    """What learning lowers.

    Args:
        name: What gives the outputs, for errors.
        learn_from: Takes a training step on a batch; one that failed before it changed anything is taken again.
        held_out_error: Held-out error of the present values.
        ranks: Processes that share the rows of every batch, and learn the same; the first one's store counts.
    """

    name: str
    learn_from: Callable[[int], None]
    held_out_error: Callable[[], float]
    ranks: Ranks = ALONE


def learn(
    objective: Objective,
    learned: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    order: Sequence[int],
    progress: Callable[[int], None],
    saved: Saved = NOTHING_SAVED,
    patience: int = PATIENCE,
) -> TrainingLog:
    """Take steps at rates that fall linearly to zero, and end with the values of the least held-out error.

    Args:
        objective: Training step and held-out error.
        learned: What the steps change.
        optimizer: Its parameters are those tensors.
        order: Batch of every step.
        progress: Called with the number of steps done, when the error was looked at.
        saved: Keeps where the learning is when the error was looked at, if it did so long enough ago for the size; one
            that was cut is gone on with.
        patience: Checks in a row without a better error that end it.

    Raises:
        NumericalError: If the error at the start is not finite.
    """
    rates, steps = [group["lr"] for group in optimizer.param_groups], len(order)
    known = objective.ranks.from_owner(saved.load(_STATE), 0)
    if known is None:
        start = objective.held_out_error()
        if not math.isfinite(start):
            raise NumericalError(f"{objective.name} gives outputs that are NaN or Inf; check its weights")
        at, kept = TrainingState(start, start, 0, 0, 0), [tensor.clone() for tensor in learned]
    else:
        at, kept = _restored(known, learned, optimizer)
    fixed = FixedOrder(learned[0].device)
    interval, since = min(max(1, -(-steps // CHECKS)), MOST_STEPS), time.monotonic()
    size = 4 * sum(tensor.nbytes for tensor in learned)  # values, best values and two moments
    while at.done < steps and at.idle < patience:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - at.done / steps)
        fixed.run(partial(objective.learn_from, order[at.done]))
        at.done += 1
        if at.done % interval == 0 or at.done == steps:
            error = objective.held_out_error()
            at.idle += 1
            if error < at.best:
                at.best, at.best_step, at.idle = error, at.done, 0
                kept = [tensor.clone() for tensor in learned]
            if time.monotonic() - since >= size / BYTES_PER_SECOND:
                saved.save(_STATE, _training_state(at, kept, learned, optimizer))
                since = time.monotonic()
            progress(at.done)
    with torch.no_grad():
        for tensor, value in zip(learned, kept, strict=True):
            tensor.copy_(value)
    return TrainingLog(at.before, at.best, at.best_step, at.done, fixed.kept)


def share_gradients(learned: Sequence[Tensor], ranks: Ranks, rows: int) -> None:
    """Replace gradients of a mean over some rows by those of the mean over the rows of all ranks."""
    if ranks.size > 1:
        gradients = [tensor.grad for tensor in learned if tensor.grad is not None]
        for gradient, mean in zip(gradients, ranks.averages(gradients, rows), strict=True):
            gradient.copy_(mean)


def _training_state(
    at: TrainingState, kept: list[Tensor], learned: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    moments = [dict(optimizer.state[tensor]) for tensor in learned]
    return {"at": vars(at), "kept": kept, "learned": list(learned), "moments": moments}


def _restored(
    known: dict[str, Any], learned: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[TrainingState, list[Tensor]]:
    """Put values and moments back; where the learning was, and the best values."""
    with torch.no_grad():
        for tensor, value, moments in zip(learned, known["learned"], known["moments"], strict=True):
            tensor.copy_(value)
            optimizer.state[tensor] = {name: moment.to(tensor.device) for name, moment in moments.items()}
    kept = [value.to(tensor.device) for tensor, value in zip(learned, known["kept"], strict=True)]
    return TrainingState(**known["at"]), kept


def batch_order(count: int, steps: int, seed: int) -> list[int]:
    """Batch of every step: all of them, shuffled, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps // count)
    return [int(b) for _ in range(epochs) for b in torch.randperm(count, generator=generator)][:steps]


class Gain:
    """A norm gain: start plus its root mean square times what is learned.

    Args:
        start: ``[width]``.
        stored_dtype: dtype of the stored gain, to which it is rounded wherever it is used.

    Attributes:
        change: ``[width]`` float32, what is learned.
    """

    def __init__(self, start: Tensor, stored_dtype: torch.dtype) -> None:
        self.start, self.stored_dtype = start.float(), stored_dtype
        self.size = self.start.square().mean().sqrt().clamp_min(1e-2)
        self.change = torch.zeros_like(self.start)
        self._leaf = self.start

    def stored(self) -> Tensor:
        """``[width]`` in the stored dtype."""
        return (self.start + self.size * self.change).to(self.stored_dtype)

    def weight(self, dtype: torch.dtype, differentiable: bool) -> Tensor:
        """``[width]`` in a dtype."""
        self._leaf = self.stored().to(dtype).requires_grad_(differentiable)
        return self._leaf

    def collect(self) -> None:
        """Set the gradient of the change from that of the latest weight, where it has one."""
        if self._leaf.grad is not None:
            self.change.grad = self._leaf.grad.float() * self.size
