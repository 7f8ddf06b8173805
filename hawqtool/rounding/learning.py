"""What refinement and distillation share: the order of batches, norm gains, and keeping the best that was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hawqtool.errors import NumericalError

CHECKS = 10
"""How often the held-out error is looked at."""

PATIENCE = 6
"""Checks in a row without a better held-out error that end the learning."""


@dataclass(frozen=True)
class Course:
    """How the learning went.

    Args:
        before: Held-out error at the start.
        after: The same at the end; never more.
        best_step: Step that is kept; 0 is the start.
        steps: Steps that were done.
    """

    before: float
    after: float
    best_step: int
    steps: int

    @property
    def record(self) -> dict[str, Any]:
        """What reports say of it."""
        errors = {"error_before": self.before, "error_after": self.after}
        return errors | {"best_step": self.best_step, "steps": self.steps}


def learn(
    what: str,
    learned: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    order: Sequence[int],
    step: Callable[[int], None],
    error: Callable[[], float],
    progress: Callable[[int], None],
) -> Course:
    """Take steps at rates that fall linearly to zero, and end with the values of the least held-out error.

    Args:
        what: What gives the outputs, for errors.
        learned: What the steps change.
        optimizer: Its parameters are those tensors.
        order: Batch of every step.
        step: Takes a step on a batch.
        error: Held-out error of the present values.
        progress: Called with the number of steps done, when the error was looked at.

    Raises:
        NumericalError: If the error at the start is not finite.
    """
    before = best = error()
    if not math.isfinite(before):
        raise NumericalError(f"{what} gives outputs that are NaN or Inf; check its weights")
    kept, best_step, done, idle = [tensor.clone() for tensor in learned], 0, 0, 0
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 - count / max(len(order), 1))
    interval = max(1, -(-len(order) // CHECKS))
    while done < len(order) and idle < PATIENCE:
        step(order[done])
        decay.step()
        done += 1
        if done % interval == 0 or done == len(order):
            found = error()
            idle += 1
            if found < best:
                best, best_step, idle = found, done, 0
                kept = [tensor.clone() for tensor in learned]
            progress(done)
    with torch.no_grad():
        for tensor, value in zip(learned, kept, strict=True):
            tensor.copy_(value)
    return Course(before, best, best_step, done)


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
