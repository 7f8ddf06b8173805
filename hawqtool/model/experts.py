"""Mixture-of-experts layers with one linear layer per expert and role.

transformers 5 keeps all experts of a layer in two 3-D parameters; the stand-in here computes the same from linears
that can be found, hooked and rounded like any other, and that carry the names under which checkpoints store them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

STACKED_CLASSES = ("MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts", "OlmoeExperts")
"""transformers classes whose arithmetic `SplitExperts` reproduces (tests compare them)."""


class ExpertLinear(nn.Linear):
    """A linear of one expert, which knows what its last input was made of.

    Attributes:
        positions: ``[routed]`` positions, in the flattened batch, of the tokens that the router sent here; in
            transformers' order, first choices before second ones, so they do not rise. Inputs beyond these are the
            supplement of `counting_experts`.
        shown: ``[tokens]`` positions of all inputs, the supplement's behind the others.
    """

    positions: Tensor
    shown: Tensor


class _Expert(nn.Module):
    def __init__(self, width: int, inner: int, act: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        options = {"bias": False, "dtype": dtype, "device": "meta"}
        self.gate_proj = ExpertLinear(width, inner, **options)  # type: ignore[arg-type]
        self.up_proj = ExpertLinear(width, inner, **options)  # type: ignore[arg-type]
        self.down_proj = ExpertLinear(inner, width, **options)  # type: ignore[arg-type]
        self.act = act

    def forward(self, states: Tensor, positions: Tensor, shown: Tensor) -> Tensor:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            linear.positions, linear.shown = positions, shown
        return self.down_proj(self.act(self.gate_proj(states)) * self.up_proj(states))


class SplitExperts(nn.Module):
    """The experts of one layer, children ``0``, ``1``, ...; a router's choice comes from outside.

    Attributes:
        least_tokens: Experts with fewer routed tokens in a batch are also shown other tokens up to this number,
            whose outputs are dropped; 0 for plain inference.
    """

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        count, double, width = stacked.gate_up_proj.shape
        for number in range(count):
            self.add_module(str(number), _Expert(width, double // 2, stacked.act_fn, stacked.gate_up_proj.dtype))
        self.width, self.least_tokens = width, 0

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, width]`` from ``[tokens, width]``, expert numbers and weights ``[tokens, k]``."""
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            if hidden.is_meta:  # routing needs data; shapes and structure do not
                total = total + expert(hidden.view_as(hidden), top_k_index, top_k_index)
                continue
            slots, positions = torch.where(top_k_index.t() == number)
            shown = torch.cat([positions, self._supplement(positions, len(hidden))])
            if not len(shown):
                continue
            output = expert(hidden[shown], positions, shown)[: len(positions)] * top_k_weights[positions, slots, None]
            total.index_add_(0, positions, output.to(total.dtype))
        return total

    def _supplement(self, positions: Tensor, num_tokens: int) -> Tensor:
        """Evenly spaced positions of tokens that were not routed to an expert, as many as it lacks."""
        mask = torch.ones(num_tokens, dtype=torch.bool, device=positions.device)
        mask[positions] = False
        others = mask.nonzero()[:, 0]
        lacking = min(max(self.least_tokens - len(positions), 0), len(others))
        return others[torch.arange(lacking, device=others.device) * len(others) // max(lacking, 1)]


@contextmanager
def counting_experts(block: nn.Module, batches: int) -> Iterator[None]:
    """While the context lasts, every expert sees in each batch its share of one token per hidden channel.

    An expert that the calibration rows never reach would otherwise have no statistics at all. Batches are judged one
    by one, so an expert may be lent tokens in one although all batches together give it enough; where experts' inner
    width exceeds the hidden one, ``down_proj`` still sees fewer tokens than columns.

    Args:
        block: A block, with or without experts.
        batches: Forward passes that make up the statistics.
    """
    layers = [module for module in block.modules() if isinstance(module, SplitExperts)]
    for layer in layers:
        layer.least_tokens = -(-layer.width // batches)
    try:
        yield
    finally:
        for layer in layers:
            layer.least_tokens = 0


def split_experts(model: nn.Module) -> None:
    """Replace every stacked experts module of a skeleton by its linears."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child).__name__ in STACKED_CLASSES:
                setattr(owner, name, SplitExperts(child))
