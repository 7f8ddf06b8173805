"""Weights of layers on a grid of floats as a function of what learning may move: places in the codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hawqtool.rounding.floats.elements import CODE_DTYPE, ELEMENTS, Element
from hawqtool.rounding.grid import expand_scales
from hawqtool.rounding.learned.fake_quant import EDGE, FlatLayers, parameter_gradients
from hawqtool.rounding.spec import InitialRounding


class FlatFloats(FlatLayers):
    """Layers as those of `FlatLayers` on one grid of floats, whose values are unevenly spaced.

    A latent is a place in the codebook: its whole part numbers a value, and between neighbouring values it is linear in
    the weight. So rounding it gives the nearest value, reach and margin count in codes as on a grid of integers, and a
    code moves by what lies between two values. Scales that are E4M3 or powers of two stay as they were found, as do
    those that rows share; those of a row in the dtype of the model are learned.
    """

    def __init__(self, initial: Sequence[InitialRounding], reach: float, margin: float = 0.0) -> None:
        grid = initial[0].quant_format.floats
        assert grid is not None  # integers are `FlatLayers`
        self.learns_scales = grid.scale == "model" and grid.group_rows == 1
        self.element: Element = ELEMENTS[grid.element]
        self.values = self.element.values().to(initial[0].rounded.codes.device)
        super().__init__(initial, reach, margin)

    def _limits(self) -> tuple[Tensor, Tensor]:
        last = len(self.values) - 1
        return self._per_group([0] * len(self.initial)), self._per_group([last] * len(self.initial))

    def _start(self, start: InitialRounding, most: float) -> Tensor:
        codes = start.rounded.codes.float()
        scaled = start.weight.float() / expand_scales(start.rounded.scales, codes.shape[1])
        chosen = torch.searchsorted(self.values, codes).float()
        offset = places(scaled, self.values) - chosen
        return chosen + torch.where(offset.abs() < EDGE, offset, 0).clamp_(-most, most)

    def _chosen(self) -> Tensor:
        """``[groups, width]`` int64, number of the value of each code."""
        return self.latent.round().clamp_(self.low, self.high).long()

    def _quantized(self) -> tuple[Tensor, Tensor]:
        levels = self.values[self._chosen()]
        return levels.to(self.stored_dtype) * self.scale.to(self.stored_dtype), levels

    def _gradients(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        along, scales = parameter_gradients(grad, self.levels, self.scale)
        steps = self.values.diff()
        below = self.latent.floor().long().clamp_(0, len(steps) - 1)
        return along * steps[below], scales if self.learns_scales else None

    def _codes(self) -> Tensor:
        return self.values[self._chosen()].to(CODE_DTYPE)


def places(scaled: Tensor, values: Tensor) -> Tensor:
    """Where numbers lie in a codebook, linear between its values and beyond its ends.

    Args:
        scaled: Weights over their scales, float32.
        values: ``[codes]`` float32, rising.

    Returns:
        Float32 of their shape: n at the n-th value, n + 1/2 in the middle between it and the next.
    """
    below = torch.searchsorted(values, scaled, right=True).sub_(1).clamp_(0, len(values) - 2)
    return below + (scaled - values[below]) / (values[below + 1] - values[below])
