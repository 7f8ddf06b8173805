"""Second moments of the inputs of linears, which guide their rounding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hawqtool.rounding.gram import gram, mean_product

SETTINGS_HELD_OUT_EVERY = 4
"""Every so many rows one is kept for the choice of settings; the final rounding sees all of them."""


@dataclass
class GroupStatistics:
    """Second moments of an input group.

    Args:
        gram: ``[in, in]`` float32, mean of x xᵀ over the tokens, by their importance where they have one.
        num_tokens: Tokens behind it.
        num_routed: Those of them that the model really sends here; fewer only in experts (see `counting_experts`).
        drift: ``[in, in]`` float32, mean of (x0 - x) xᵀ with x0 the original model's input of the same token; None
            where it is not wanted, or x is x0.
        output_drift: ``[out, in]`` float32, in its place, mean of W (x0 - x) xᵀ of a group of one linear.
        held_out: The same of the tokens of the held-out rows, which are among those above; None where there are none.
        weighted: Whether tokens count by their importance.
    """

    gram: Tensor
    num_tokens: int
    num_routed: int
    drift: Tensor | None = None
    held_out: GroupStatistics | None = None
    weighted: bool = False
    output_drift: Tensor | None = None

    def __iadd__(self, other: GroupStatistics) -> GroupStatistics:
        total = self.num_tokens + other.num_tokens
        self.gram.mul_(self.num_tokens / total).add_(other.gram, alpha=other.num_tokens / total)
        if self.drift is not None and other.drift is not None:
            self.drift.mul_(self.num_tokens / total).add_(other.drift, alpha=other.num_tokens / total)
        if self.output_drift is not None and other.output_drift is not None:
            self.output_drift.mul_(self.num_tokens / total).add_(other.output_drift, alpha=other.num_tokens / total)
        if self.held_out is None:
            self.held_out = other.held_out
        elif other.held_out is not None:
            self.held_out += other.held_out
        self.num_tokens, self.num_routed = total, self.num_routed + other.num_routed
        return self

    @property
    def fitting(self) -> GroupStatistics | None:
        """Statistics of the tokens that are not held out; None unless there are tokens of both kinds."""
        held = self.held_out
        if held is None or held.num_tokens == self.num_tokens:
            return None
        count = self.num_tokens - held.num_tokens
        share, held_share = self.num_tokens / count, held.num_tokens / count
        gram = self.gram * share - held.gram * held_share
        drift = None
        if self.drift is not None and held.drift is not None:
            drift = self.drift * share - held.drift * held_share
        return GroupStatistics(gram, count, min(self.num_routed, count), drift, weighted=self.weighted)


def second_moments(
    x: Tensor,
    routed: int,
    held_out: Tensor | None = None,
    original: Tensor | None = None,
    importance: Tensor | None = None,
    weight: Tensor | None = None,
) -> GroupStatistics:
    """Statistics of inputs ``[tokens, in]``.

    Args:
        x: The inputs.
        routed: How many of them the model really sends there.
        held_out: ``[tokens]`` bool, those of held-out rows; None where nothing is chosen on them.
        original: ``[tokens, in]``, the original model's inputs.
        importance: ``[tokens]`` float32, how much each counts; None where all count alike.
        weight: ``[out, in]``, W, where the drift is wanted at the outputs; then no tokens are held out.
    """
    roots = None if importance is None else importance.sqrt()
    found = GroupStatistics(gram(x, roots), x.shape[0], routed, weighted=importance is not None)
    if original is not None and weight is not None:
        found.output_drift = mean_product((original - x) @ weight.t(), x, roots)
        return found
    if original is not None:
        found.drift = mean_product(original - x, x, roots)
    if held_out is not None and bool(held_out.any()):
        kept, others = x[held_out], None if original is None else original[held_out]
        kept_importance = None if importance is None else importance[held_out]
        found.held_out = second_moments(kept, len(kept), None, others, kept_importance)
    return found


def is_held_out(row: Tensor) -> Tensor:
    """Whether rows of these numbers are held out: odd and even ones in turns, as rows of two sources alternate."""
    last = SETTINGS_HELD_OUT_EVERY - 1 - row // SETTINGS_HELD_OUT_EVERY % 2
    return row % SETTINGS_HELD_OUT_EVERY == last
