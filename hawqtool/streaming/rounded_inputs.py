"""Linears that see their inputs as an engine rounds them, where a format rounds activations too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hawqtool.formats.activations import ActivationFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.rounding.floats.activations import fake_quantize

_FORMAT = "rounds_inputs"
"""Attribute of a module with the format of its inputs; None while they are left as they are."""


@contextmanager
def rounded_inputs(block: LoadedBlock, formats: Mapping[str, ActivationFormat]) -> Iterator[None]:
    """While the context lasts, linears of a block get rounded inputs, and so does what looks at inputs from then on.

    Args:
        block: The loaded block.
        formats: How inputs are rounded, by name of the linear.
    """
    hooks = []
    for linear in block.spec.linears:
        if linear.name in formats:
            module = block.linear(linear)
            setattr(module, _FORMAT, formats[linear.name])
            hooks.append((module, module.register_forward_pre_hook(_round)))
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.remove()
            delattr(module, _FORMAT)


@contextmanager
def exact_inputs(module: nn.Module) -> Iterator[None]:
    """While the context lasts, no linear inside a module rounds its inputs: the original model runs."""
    found = [(part, getattr(part, _FORMAT)) for part in module.modules() if getattr(part, _FORMAT, None) is not None]
    for part, _ in found:
        setattr(part, _FORMAT, None)
    try:
        yield
    finally:
        for part, activations in found:
            setattr(part, _FORMAT, activations)


def _round(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    activations: ActivationFormat | None = getattr(module, _FORMAT, None)
    first: Tensor = inputs[0]
    return inputs if activations is None else (fake_quantize(first, activations), *inputs[1:])
