"""Where a model's blocks are, found by running one row: whatever wraps the language model, its blocks are run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hawqtool.errors import InputError, one_line
from hawqtool.model.inputs.arguments import model_inputs, row_format
from hawqtool.model.kept import is_linear

TOKENS, _TOKEN = 8, 2
_PARAMETRIZED = ".parametrizations."

TRACE_ERRORS = (
    *(RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, LookupError, ArithmeticError),
)
"""What models raise that cannot be run on one row without weights."""


_CHANCE = {"rand", "randn", "rand_like", "randn_like", "randint", "randperm", "bernoulli", "multinomial", "normal"}
"""Functions of torch that draw numbers."""


class _Drawn(Tensor):
    """A single number that was drawn, as many decoders do for each layer and use in training alone."""


class _NoChance(TorchFunctionMode):
    """Refuses a model that uses numbers which it draws: no two of its passes agree."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = getattr(func, "__name__", "") in _CHANCE
        if drawn and func is torch.rand and args == ([],):
            return torch.zeros(()).as_subclass(_Drawn)
        if drawn or _Drawn in types:
            raise InputError(
                f"{self.kind} draws random numbers ({func.__name__}) when it is run, so that no two passes agree; "
                "expected a model whose outputs follow from its inputs"
            )
        return func(*args, **(kwargs or {}))


class _FirstBlock(Exception):
    """A block is reached; its list is the message."""


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Module name of the list of blocks, and the list.

    The first list of modules with linears that a row reaches is the one: towers of a multimodal model come first in the
    model, but are not called by tokens.

    Args:
        model: Skeleton; its buffers are real.

    Raises:
        InputError: If no list is reached.
    """
    lists = {name: found for name, found in block_lists(model).items() if any(map(is_linear, found.modules()))}
    if not lists:
        raise InputError(
            f"{type(model).__name__}: its blocks hold no linear layer, only convolutions or layers of its own, which "
            "are not quantized; expected a transformer"
        )
    with _reporting(lists):
        try:
            run_on_zeros(model)
        except _FirstBlock as reached:
            name = str(reached)
            return name, lists[name]
        except TRACE_ERRORS as error:
            if "written-to tensor" in str(error):
                raise InputError(
                    f"{type(model).__name__} writes into its weights when it is run; expected a model that leaves them"
                ) from error
            raise InputError(
                f"{type(model).__name__}: the part before the blocks cannot be traced: {one_line(error)}; "
                "this architecture is not supported"
            ) from error
    raise InputError(f"{type(model).__name__}: no list of blocks is run; this architecture is not supported")


def cache_error(model: Any) -> str | None:
    """What a model raises before its first block when it is to keep keys and values; None where it reaches it.

    Args:
        model: Skeleton; its buffers are real.
    """
    with _reporting(block_lists(model)):
        try:
            run_on_zeros(model, use_cache=True)
        except _FirstBlock:
            return None
        except TRACE_ERRORS as error:
            return one_line(error)
    return None


def run_on_zeros(model: Any, rows: Tensor | None = None, differentiable: bool = False, **options: Any) -> Any:
    """Output of a model for the example row, or for others, every weight zero.

    Zeros of any shape take the memory of one: what the model computes here is of no interest. What is divided by its
    norm is one, because zeros would make NaN.

    Args:
        model: Skeleton; its buffers are real.
        rows: What the model reads.
        differentiable: Whether gradients are kept track of.
        options: Further arguments of the model.
    """
    weights = {
        n: torch.full((), float(_PARAMETRIZED in n), dtype=p.dtype).expand(p.shape) for n, p in model.named_parameters()
    }
    inputs = model_inputs(model, example_row(model) if rows is None else rows) | options
    with torch.set_grad_enabled(differentiable), _NoChance(type(model).__name__):
        return torch.func.functional_call(model, weights, (), inputs)


def example_row(model: Any, rows: int = 1, tokens: int = TOKENS) -> Tensor:
    """Rows of what the model reads (see `model_inputs`), of so many tokens where it reads any."""
    return row_format(model).example(rows, tokens, _TOKEN, model.dtype)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists by name that may hold blocks: outermost ones of modules that are made of modules."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not any(part.isdecimal() for part in name.split("."))
        and any(list(element.children()) for element in module)
    }


@contextmanager
def _reporting(lists: dict[str, nn.ModuleList]) -> Iterator[None]:
    """While the context lasts, a call of a list's element raises `_FirstBlock`."""

    def reached(name: str) -> Any:
        def hook(*_: Any) -> None:
            raise _FirstBlock(name)

        return hook

    hooks = [element.register_forward_pre_hook(reached(n)) for n, found in lists.items() for element in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
