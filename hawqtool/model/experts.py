"""Mixture-of-experts layers with one linear layer per expert and role.

transformers 5 keeps all experts of a layer in two 3-D parameters; the stand-in here computes the same from linears
that can be found, hooked and rounded like any other, and that carry the names under which checkpoints store them.
"""

from __future__ import annotations

import copy
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.checkpoint.fusion import expert_of
from hawqtool.model.experts_layout import (
    Combine,
    ExpertsLayout,
    combine_function,
    holds_experts,
    read_layout,
    takes_choice,
    why_unproved,
)


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
    def __init__(self, layout: ExpertsLayout, combine: Combine, dtype: torch.dtype) -> None:
        super().__init__()
        self.roles, self.combine = layout.roles, combine
        for role in layout.roles:
            shape = (layout.inner, layout.width) if role == "down_proj" else (layout.width, layout.inner)
            self.add_module(role, ExpertLinear(*shape, bias=layout.biased, dtype=dtype, device="meta"))

    def forward(self, states: Tensor, positions: Tensor, shown: Tensor) -> Tensor:
        *first, down = (self.get_submodule(role) for role in self.roles)
        for linear in (*first, down):
            linear.positions, linear.shown = positions, shown
        output: Tensor = down(self.combine(*(linear(states) for linear in first)))
        return output


class SplitExperts(nn.Module):
    """The experts of one layer, children ``0``, ``1``, ...; a router's choice comes from outside.

    Attributes:
        replaces: Class of the module in whose place it is.
        least_tokens: Experts with fewer routed tokens in a batch are also shown other tokens up to this number,
            whose outputs are dropped; 0 for plain inference.
    """

    def __init__(self, stacked: Any, layout: ExpertsLayout) -> None:
        super().__init__()
        combine = combine_function(stacked, layout)
        for number in range(layout.count):
            self.add_module(str(number), _Expert(layout, combine, stacked.down_proj.dtype))
        self.width, self.layout, self.least_tokens = layout.width, layout, 0
        self.replaces = type(stacked)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, width]`` from ``[tokens, width]``, expert numbers and weights ``[tokens, k]``."""
        total = torch.zeros_like(hidden)
        if hidden.is_meta:  # routing needs data; shapes and structure do not
            for expert in self.children():
                total = total + expert(hidden.view_as(hidden), top_k_index, top_k_index)
            return total
        chosen = zip(self.children(), *_by_expert(top_k_index, top_k_weights, self.layout.count), strict=True)
        for expert, positions, weights in chosen:
            shown = positions
            if len(positions) < self.least_tokens:
                shown = torch.cat([positions, self._supplement(positions, len(hidden))])
            if not len(shown):
                continue
            output = expert(hidden[shown], positions, shown)[: len(positions)] * weights
            total.index_add_(0, positions, output.to(total.dtype))
        return total

    def _supplement(self, positions: Tensor, num_tokens: int) -> Tensor:
        """Evenly spaced positions of tokens that were not routed to an expert, as many as it lacks."""
        mask = torch.ones(num_tokens, dtype=torch.bool, device=positions.device)
        mask[positions] = False
        others = mask.nonzero()[:, 0]
        lacking = min(max(self.least_tokens - len(positions), 0), len(others))
        return others[torch.arange(lacking, device=others.device) * len(others) // max(lacking, 1)]


def _by_expert(top_k_index: Tensor, top_k_weights: Tensor, count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Positions ``[routed]`` and weights ``[routed, 1]`` of each expert's tokens, first choices before second ones.

    All experts' come of one sort: to look for each one's would have a GPU wait for the answer that many times.

    Args:
        top_k_index: ``[tokens, k]``; other numbers than those of experts are nobody's.
        top_k_weights: ``[tokens, k]``.
        count: Experts.
    """
    numbers, places = top_k_index.t().flatten().sort(stable=True)
    borders = torch.arange(count + 1, dtype=numbers.dtype, device=numbers.device)
    bounds = torch.searchsorted(numbers, borders).tolist()
    sizes = [last - first for first, last in itertools.pairwise(bounds)]
    places = places[bounds[0] : bounds[-1]]
    weights = top_k_weights.t().flatten().index_select(0, places)[:, None]
    return (places % len(top_k_index)).split(sizes), weights.split(sizes)


class ScaledExperts(SplitExperts):
    """Experts whose inputs the router has scaled, zero where it did not choose them (Llama 4)."""

    def forward(self, hidden: Tensor, *_: Tensor) -> Tensor:
        """``[experts * tokens, width]`` from inputs of that shape, expert by expert."""
        if hidden.is_meta:
            places = hidden.new_empty(len(hidden) // self.layout.count, dtype=torch.long)
            parts = hidden.chunk(self.layout.count)
            return torch.cat([e(part, places, places) for e, part in zip(self.children(), parts, strict=True)])
        states = hidden.view(self.layout.count, -1, self.width)
        total, routed = torch.zeros_like(states), states.any(-1)
        anywhere = routed.any(0)
        for number, expert in enumerate(self.children()):
            positions = routed[number].nonzero()[:, 0]
            lent = self._supplement(positions, states.shape[1])
            lent = lent[anywhere[lent]]
            if not len(positions) + len(lent):
                continue
            # A token is lent as the first expert that was to see it got it.
            first = routed[:, lent].int().argmax(0)
            inputs = torch.cat([states[number, positions], states[first, lent]])
            output = expert(inputs, positions, torch.cat([positions, lent]))
            total[number, positions] = output[: len(positions)].to(total.dtype)
        return total.flatten(0, 1)


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


def has_experts(block: nn.Module) -> bool:
    """Whether a block has experts one by one, whose tokens depend on the rows."""
    return any(isinstance(module, SplitExperts) for module in block.modules())


WhyUnread = Callable[[Any, ExpertsLayout], str | None]
"""From an experts module and its layout to the reason why no engine reads its experts one by one; None if one does."""


def split_experts(model: nn.Module, why_unread: WhyUnread = lambda *_: None) -> dict[str, str]:
    """Replace the experts modules of a skeleton by their linears, where these are proved to compute the same.

    Args:
        model: The skeleton.
        why_unread: Asked before the proof.

    Returns:
        The modules that stay as they are, by name, each with the reason.
    """
    whole: dict[str, str] = {}
    proved: dict[type[nn.Module], str | None] = {}
    for path, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            if not (holds_experts(child) or takes_choice(child)):
                continue
            layout, kind = read_layout(child), type(child)
            if kind not in proved:
                proved[kind] = _why_whole(child, layout, why_unread)
            reason = proved[kind]
            if layout is None or reason is not None:
                whole[f"{path}.{name}" if path else name] = str(reason)
                for part in child.modules():
                    part.why_whole = str(reason)
                if layout is not None or len(child._parameters) == 1 or takes_choice(child):
                    child.__class__ = type(kind.__name__, (WholeExperts, kind), {})
                    _run_plainly(child)
            else:
                setattr(owner, name, (ScaledExperts if layout.scaled else SplitExperts)(child, layout))
    return whole


class WholeExperts(nn.Module):
    """Experts that stay as they are: routing needs data, hence on meta they give the shape alone."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Output of the experts ``[tokens, width]``; of one linear of each, as many as these have outputs."""
        if not hidden.is_meta:
            return super().forward(hidden, *args, **kwargs)
        width = hidden.shape[-1]
        shapes = [parameter.shape[1:] for parameter in self._parameters.values() if parameter is not None]
        if len(shapes) == 1 and width in shapes[0]:
            width = shapes[0][0] if shapes[0][1] == width else shapes[0][1]
        return hidden.new_empty(*hidden.shape[:-1], width)


def _run_plainly(experts: Any) -> None:
    """Have experts compute one by one: fused products of all have no forward derivatives."""
    if getattr(experts, "config", None) is not None:
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation = "eager"


def _why_whole(module: nn.Module, layout: ExpertsLayout | None, why_unread: WhyUnread) -> str | None:
    if layout is None:
        return f"experts of unknown layout ({type(module).__name__})"
    return why_unread(module, layout) or why_unproved(module, layout)


_PER_TOKEN = re.compile(
    r"(num_)?(selected_)?experts_per_tok(en)?|num_selected_experts|moe_(top_?k|k)|top_k(_experts)?|n_activated_experts"
)


def experts_per_token(config: Any) -> int | None:
    """Routed experts that a token goes through, by the configuration; None where it does not say.

    Where layers differ it is the most of them.
    """
    found = [value for name, value in vars(config.get_text_config()).items() if _PER_TOKEN.fullmatch(name)]
    counts = [n for value in found for n in (value if isinstance(value, (list, tuple)) else [value])]
    return max((n for n in counts if isinstance(n, int) and n > 0), default=None)


def active_share(names: Sequence[str], weights: Sequence[int], per_token: int) -> float:
    """Share of the weights of some linears that one token reads, experts being numbered within each of their lists.

    Args:
        names: Linears.
        weights: Weights of each.
        per_token: Experts that a token goes through.
    """
    experts = [expert_of(name) for name in names]
    numbers: dict[str, set[int]] = {}
    for place, number in filter(None, experts):
        numbers.setdefault(place, set()).add(number)
    shares = [1.0 if found is None else min(1.0, per_token / len(numbers[found[0]])) for found in experts]
    return sum(map(operator.mul, shares, weights)) / sum(weights)


def routers(model: nn.Module) -> set[str]:
    """Names of the modules that choose experts: with a matrix of one row per expert, beside the experts.

    Engines keep them as they are, and so do we: an error there sends tokens elsewhere.
    """
    found: set[str] = set()
    for path, owner in model.named_modules():
        counts = {_count(child) for child in owner.children()}
        counts -= {0}
        for name, module in owner.named_modules(prefix=path) if counts else ():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and weight.shape[0] in counts:
                found.add(name)
    return {name for name in found if not isinstance(model.get_submodule(name), ExpertLinear)}


def _count(module: nn.Module) -> int:
    if isinstance(module, SplitExperts):
        return module.layout.count
    return next(len(p) for p in module._parameters.values() if p is not None) if holds_experts(module) else 0
