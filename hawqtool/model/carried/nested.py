"""Nested values that blocks take and give: tuples, lists and mappings of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx.experimental import _config as meta_settings


@dataclass(frozen=True)
class Carried:
    """Stands in recorded values for a tensor that is carried.

    Args:
        leaf: Its name: number of the block that gave it, and its place among what that block gave.
    """

    leaf: tuple[int, int]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a nested value whose tensors, and what stands in for some, are changed; mappings keep their class."""
    if isinstance(value, Tensor | Carried):
        return change(value)
    if isinstance(value, tuple):
        parts = (mapped(part, change) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [mapped(part, change) for part in value]
    if isinstance(value, MutableMapping):
        found = copy.copy(value)
        for key, part in value.items():
            found[key] = mapped(part, change)
        return found
    return value


def leaves(value: Any) -> Iterator[Any]:
    """Tensors, and what stands in for some, of a nested value in order."""
    if isinstance(value, Tensor | Carried):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, MutableMapping):
        for part in value.values():
            yield from leaves(part)


def on_meta(value: Any) -> Any:
    """A copy of a nested value on the meta device; what was one tensor stays one."""
    twins: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        return twins.setdefault(id(tensor), tensor.detach().to("meta"))

    return mapped(value, moved)


def mappings(value: Any) -> Iterator[MutableMapping[Any, Any]]:
    """Mappings of a nested value in order, outer ones first."""
    if isinstance(value, MutableMapping):
        yield value
        for part in value.values():
            yield from mappings(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from mappings(part)


@contextmanager
def all_nonzero() -> Iterator[None]:
    """While the context lasts, ``nonzero`` of a tensor on the meta device finds every element, as none has a value."""
    with meta_settings.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
        yield
