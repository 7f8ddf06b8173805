"""Weights that transformers joins, cuts or transposes while it loads them, made as it makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hawqtool.checkpoint.prefetch import Prefetcher
from hawqtool.model.stored_names import Conversion


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or a packed folder read back."""

    def tensor(self, name: str) -> Tensor:
        """Tensor of that name, on the CPU."""

    def __contains__(self, name: object) -> bool: ...


class ConvertedSource:
    """A source of weights under the names of a model's parameters where these are no stored tensors.

    Args:
        source: Reads stored tensors.
        conversions: How parameters are made of them, by name.
        model: The model.
    """

    def __init__(self, source: WeightSource, conversions: Mapping[str, Conversion], model: Any) -> None:
        self._source, self._conversions, self._model = source, conversions, model

    def __contains__(self, name: object) -> bool:
        conversion = self._conversions.get(name) if isinstance(name, str) else None
        if conversion is None:
            return name in self._source
        return all(stored in self._source for _, stored in conversion.sources)

    def expect(self, names: Sequence[str], pinned: bool | None = None) -> None:
        """Have stored tensors read ahead where the source can (see `Prefetcher`)."""
        if isinstance(self._source, Prefetcher):
            self._source.expect([name for name in names if name not in self._conversions], pinned)

    def tensor(self, name: str) -> Tensor:
        """Parameter or stored tensor of that name, on the CPU."""
        conversion = self._conversions.get(name)
        if conversion is None:
            return self._source.tensor(name)
        with torch.no_grad():
            return conversion.tensor(self._model, self._source.tensor).contiguous()
