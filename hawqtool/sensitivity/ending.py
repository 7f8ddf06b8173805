"""The last linear of a block without its product, where only gradients are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.model.sweep import local_name
from hawqtool.records import BlockSpec


class _NoProduct(torch.autograd.Function):
    """Zeros in the place of x Wᵀ, with its gradient at x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None


def last_linear(block: nn.Module, spec: BlockSpec) -> nn.Linear | None:
    """The linear that a block calls last, if it is a plain one and alone with its input."""
    group = spec.input_groups[-1]
    module = block.get_submodule(local_name(spec, group[0]))
    return module if len(group) == 1 and type(module) is nn.Linear else None


@contextmanager
def without_product(linear: nn.Linear) -> Iterator[None]:
    """While the context lasts, the linear gives zeros, whose gradient arrives at its input as that of its output would.

    All other gradients are right only if what comes behind adds its output to something: see `adds_up`.
    """
    linear.forward = lambda x: _NoProduct.apply(x, linear.weight)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del linear.forward


def adds_up(at_output: Tensor, at_linear: Tensor) -> bool:
    """Whether the gradient at a linear's output is that at the block's: then the block adds the one to the other.

    A norm behind the linear, or a factor, would have changed it. Where it is zero, so are all others.
    """
    return at_output.numel() == at_linear.numel() and torch.equal(at_output, at_linear.view_as(at_output))
