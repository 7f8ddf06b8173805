"""Weights of rounded layers as a function of what learning may move: rounding offsets and group scales.

All layers with groups of one width share flat tensors, so that a step costs a few operations however many layers a
block has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hawqtool.rounding.grid import Quantized, expand_scales
from hawqtool.rounding.spec import InitialRounding

EDGE = 0.499
"""Largest distance of a latent from the middle of its rounding cell at the start and in the outermost cells."""

MAX_SCALE_CHANGE = math.log(2)
"""Scales keep their sign and stay within a factor of 2 of the start."""


def fake_quantize(
    latent: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, stored_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights that codes ``clamp(round(latent), low, high)`` stand for, as loaders compute them.

    Args:
        latent: ``[groups, width]`` float32, positions on the grid of codes.
        scale: ``[groups, 1]`` float32; cast to the stored dtype here.
        zero: ``[groups, 1]`` float32, zero points.
        low: ``[groups, 1]`` float32, smallest codes.
        high: ``[groups, 1]`` float32, largest codes.
        stored_dtype: dtype of the stored scales, and of the weights.

    Returns:
        Weights in the stored dtype, and levels (codes less zero points) as float32, ``[groups, width]`` each.
    """
    levels = latent.round().clamp_(low, high).sub_(zero)
    return levels.to(stored_dtype) * scale.to(stored_dtype), levels


def parameter_gradients(grad: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the latents (straight through the rounding) and of the logarithms of the scales.

    The weight is level times scale, so the second is exact where codes stay; the first takes rounding for the
    identity.

    Args:
        grad: ``[groups, width]``, gradient of the weights.
        levels: ``[groups, width]`` float32, from `fake_quantize`.
        scale: ``[groups, 1]`` float32.

    Returns:
        ``[groups, width]`` and ``[groups, 1]`` float32.
    """
    along = grad.to(scale.dtype) * scale
    return along, (along * levels).sum(-1, keepdim=True)


class FlatLayers:
    """All layers of a block whose groups have one width and whose scales have one dtype.

    Args:
        initial: The layers; their codes give the start exactly.
        reach: How far latents may move, in codes.
        margin: Least distance of latents from the borders of their cells at the start, in codes: what the noise of a
            few steps does not cross.

    Attributes:
        latent: ``[groups, width]`` float32.
        log_change: ``[groups, 1]`` float32, logarithm of scale over starting scale.
        leaf: ``[groups, width]``, the latest differentiable weights, which gradients are taken of.
    """

    def __init__(self, initial: Sequence[InitialRounding], reach: float, margin: float = 0.0) -> None:
        self.initial = initial
        self.stored_dtype = initial[0].rounded.scales.dtype
        self.width = group_width(initial[0].rounded)
        self.scale_start = torch.cat([s.rounded.scales.float().view(-1, 1) for s in initial])
        self.zero = torch.cat([zero_points(s.rounded).view(-1, 1) for s in initial])
        self.low, self.high = self._limits()
        self.latent = torch.cat([self._start(s, EDGE - margin).view(-1, self.width) for s in initial])
        self.lowest = torch.maximum(self.latent - reach, self.low - EDGE)
        self.highest = torch.minimum(self.latent + reach, self.high + EDGE)
        self.log_change = torch.zeros_like(self.scale_start)
        self.leaf = self.levels = self.latent

    @property
    def latents(self) -> list[Tensor]:
        """Rounding offsets that are learned."""
        return [self.latent]

    def _limits(self) -> tuple[Tensor, Tensor]:
        """``[groups, 1]`` float32 each, the least and the largest place on the grid of codes."""
        kinds = [s.quant_format for s in self.initial]
        return self._per_group([kind.min_code for kind in kinds]), self._per_group([kind.max_code for kind in kinds])

    def _start(self, start: InitialRounding, most: float) -> Tensor:
        """``[out, in]`` float32, where the weights of a layer lie at the start, ``most`` from the middle of a cell."""
        return _start_latent(start, most)

    def _quantized(self) -> tuple[Tensor, Tensor]:
        """Weights and levels as they are now, see `fake_quantize`."""
        return fake_quantize(self.latent, self.scale, self.zero, self.low, self.high, self.stored_dtype)

    def _gradients(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of latent and log_change from that of the weights; None of what is not learned."""
        return parameter_gradients(grad, self.levels, self.scale)

    def _codes(self) -> Tensor:
        """``[groups, width]``, codes as they are now."""
        return self.latent.round().clamp_(self.low, self.high).to(torch.int8)

    def _per_group(self, values: Sequence[int]) -> Tensor:
        parts = [torch.full((s.rounded.scales.numel(), 1), float(v)) for s, v in zip(self.initial, values, strict=True)]
        return torch.cat(parts).to(self.scale_start.device)

    @property
    def scale(self) -> Tensor:
        """``[groups, 1]`` float32."""
        return self.scale_start * self.log_change.exp()

    def weights(self, dtype: torch.dtype, differentiable: bool) -> dict[str, Tensor]:
        """Weights ``[out, in]`` of every layer in a dtype; differentiable ones are views of `leaf`."""
        value, levels = self._quantized()
        value = value.to(dtype).requires_grad_(differentiable)
        if differentiable:  # otherwise those of a whole model would stay in memory
            self.leaf, self.levels = value, levels
        return by_layer(self.initial, value)

    def collect(self) -> None:
        """Set the gradients of latents and log_change from that of `leaf`, where it has one, and let both go."""
        if self.leaf.grad is not None:
            self.latent.grad, self.log_change.grad = self._gradients(self.leaf.grad)
        self.leaf = self.levels = self.latent

    def confine(self) -> None:
        """Keep what moved within its limits."""
        torch.clamp(self.latent, self.lowest, self.highest, out=self.latent)
        self.log_change.clamp_(-MAX_SCALE_CHANGE, MAX_SCALE_CHANGE)

    def rounded(self) -> dict[str, Quantized]:
        """Codes, scales and zero points of every layer as they are now."""
        counts = [s.rounded.scales.numel() for s in self.initial]
        codes = self._codes().split(counts)
        scales = self.scale.to(self.stored_dtype).split(counts)
        return {
            s.name: s.rounded._replace(codes=c.reshape(s.rounded.codes.shape), scales=f.reshape(s.rounded.scales.shape))
            for s, c, f in zip(self.initial, codes, scales, strict=True)
        }


class FlatScales:
    """Layers as those of `FlatLayers`, whose codes are fixed.

    Args:
        initial: The layers; their weights before rounding do not matter.

    Attributes:
        log_change: ``[groups, 1]`` float32, logarithm of scale over starting scale.
    """

    latents: Sequence[Tensor] = ()

    def __init__(self, initial: Sequence[InitialRounding]) -> None:
        self.initial = initial
        self.stored_dtype = initial[0].rounded.scales.dtype
        self.scale_start = torch.cat([s.rounded.scales.float().view(-1, 1) for s in initial])
        self.levels = torch.cat([_levels(s.rounded) for s in initial])
        self.log_change = torch.zeros_like(self.scale_start)
        self._leaf = self.scale_start

    @property
    def scale(self) -> Tensor:
        """``[groups, 1]`` float32."""
        return self.scale_start * self.log_change.exp()

    def weights(self, dtype: torch.dtype, differentiable: bool) -> dict[str, Tensor]:
        """Weights ``[out, in]`` of every layer in a dtype, as loaders compute them."""
        value = self.levels.to(self.stored_dtype) * self.scale.to(self.stored_dtype)
        value = value.to(dtype).requires_grad_(differentiable)
        if differentiable:
            self._leaf = value
        return by_layer(self.initial, value)

    def collect(self) -> None:
        """Set the gradient of `log_change` from that of the latest weights, and let both go.

        The weight is level times scale, so ∂L/∂log s = s Σ level · ∂L/∂w, exact but for the rounding of s as it is
        stored, which is taken for the identity.
        """
        if self._leaf.grad is not None:
            self.log_change.grad = (self._leaf.grad.float() * self.levels).sum(-1, keepdim=True) * self.scale
        self._leaf = self.scale_start

    def confine(self) -> None:
        """Keep what moved within its limits."""
        self.log_change.clamp_(-MAX_SCALE_CHANGE, MAX_SCALE_CHANGE)

    def rounded(self) -> dict[str, Quantized]:
        """Codes, scales and zero points of every layer as they are now."""
        parts = self.scale.to(self.stored_dtype).split([s.rounded.scales.numel() for s in self.initial])
        return {
            s.name: s.rounded._replace(scales=part.reshape(s.rounded.scales.shape))
            for s, part in zip(self.initial, parts, strict=True)
        }


def by_kind(initial: Iterable[InitialRounding]) -> list[list[InitialRounding]]:
    """Layers by width of their groups, dtype of their scales and grid of floats, empty for integers."""
    kinds: dict[tuple[int, torch.dtype, str], list[InitialRounding]] = {}
    for layer in initial:
        kind = group_width(layer.rounded), layer.rounded.scales.dtype, layer.quant_format.grid
        kinds.setdefault(kind, []).append(layer)
    return list(kinds.values())


def by_layer(initial: Sequence[InitialRounding], flat: Tensor) -> dict[str, Tensor]:
    """Views ``[out, in]`` of flat weights by layer."""
    parts = flat.split([s.rounded.scales.numel() for s in initial])
    return {s.name: part.view(s.rounded.codes.shape) for s, part in zip(initial, parts, strict=True)}


def group_width(rounded: Quantized) -> int:
    """Weights that share a scale."""
    return rounded.codes.shape[1] // rounded.scales.shape[1]


def _levels(rounded: Quantized) -> Tensor:
    """Codes less zero points, ``[groups, width]`` in the smallest integers that hold them."""
    codes = rounded.codes.reshape(-1, group_width(rounded))
    return codes if rounded.zeros is None else codes.short() - rounded.zeros.short().view(-1, 1)


def zero_points(rounded: Quantized) -> Tensor:
    """Zero points ``[out, groups]`` float32, zeros on a symmetric grid."""
    return torch.zeros_like(rounded.scales.float()) if rounded.zeros is None else rounded.zeros.float()


def _start_latent(start: InitialRounding, most: float) -> Tensor:
    """Where each weight lies on the grid, ``[out, in]``: one near the border of its cell is cheap to move across.

    Where compensation or clipping chose another code than the nearest, nothing says how strongly: the middle of its
    cell. (At the border nearest to the weight, the first steps undo the compensation.)
    """
    codes, scales = start.rounded.codes, start.rounded.scales
    columns = codes.shape[1]
    place = start.weight.float() / expand_scales(scales, columns) + expand_scales(zero_points(start.rounded), columns)
    offset = place - codes.float()
    return codes.float() + torch.where(offset.abs() < EDGE, offset, 0).clamp_(-most, most)
