"""Codes by annealed noise: each weight has a logit for its code and its neighbours, and the likeliest is taken.

GSQ (arXiv 2604.18556) learns codes so. A soft weight is scale times Σ_k p_k level_k, with p the softmax of
(κ logits + Gumbel noise) / τ; as the temperature τ falls and the sharpness κ rises, p becomes the choice of one level.
Gradients go through p, and steps follow their sign alone (Lion, arXiv 2302.06675).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hawqtool.rounding.grid import Quantized
from hawqtool.rounding.learned.fake_quant import MAX_SCALE_CHANGE, by_layer, group_width, zero_points
from hawqtool.rounding.spec import InitialRounding

TEMPERATURE, SHARPNESS = (2.0, 0.05), (100.0, 500.0)
"""τ and κ at the first and at the last step; they change linearly in between."""

LEVEL_GAP = 0.06
"""Start logits fall by half of this times the squared distance to the starting code."""

BETAS = (0.9, 0.95)
"""Share of the old mean of gradients in a step's direction, and in the new mean."""

_ABSENT = -1e4
"""Logit of a level outside the grid: its probability is zero to the bit, and so is its gradient."""

_NOISE = 1 << 18
"""Noise values of a step that are told apart; further groups of weights get the same again."""

_MASK = 0xFFFFFFFF


def logit_rate(steps: int) -> float:
    """First step of the logits: in so many steps they travel far enough for another code to win.

    A logit travels rate times steps at most, and 0.03 lie between neighbours.
    """
    return 6e-4 * math.sqrt(200 / max(steps, 1))


def scale_rate(steps: int) -> float:
    """First relative step of the scales."""
    return 1e-3 * math.sqrt(200 / max(steps, 1))


def noise_key(seed: int, name: str) -> int:
    """Key of the noise of a layer, 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


def gumbel_noise(count: int, key: int, step: int, device: torch.device) -> Tensor:
    """Gumbel noise ``[count]`` float32: -log(-log u), u a hash of key, step and place, whatever the device.

    Generators give other numbers on a GPU than on a CPU, and other ones again on another GPU.
    """
    state = torch.arange(count, dtype=torch.int64, device=device)
    for salt in (key, step):
        state = _mixed((state ^ (salt & _MASK)) + 0x9E3779B9 & _MASK)
    return uniform(state).log_().neg_().log_().neg_()


def uniform(state: Tensor) -> Tensor:
    """Numbers of 32 bits as float32 between 0 and 1, neither of which occurs: 23 bits and a half are exact."""
    return ((state >> 9).float() + 0.5) / (1 << 23)


def _mixed(state: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, that spreads each bit over all (Wellons, lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        state = (state ^ (state >> shift)) * factor & _MASK
    return state ^ (state >> 16)


def logit_gradients(probabilities: Tensor, distances: Sequence[int], mean: Tensor, against: Tensor) -> Tensor:
    """∂L/∂logit_k = p_k (d_k - Σ p d) ∂L/∂level, written over the probabilities.

    Args:
        probabilities: ``[levels, groups, width]`` float32.
        distances: Distance of each level from the starting code.
        mean: ``[groups, width]`` float32, Σ_k p_k d_k.
        against: ``[groups, width]`` float32, -∂L/∂level, times κ/τ.
    """
    pull = mean * against
    for part, distance in zip(probabilities, distances, strict=True):
        part.mul_(torch.sub(pull, against, alpha=distance) if distance else pull)
    return probabilities


class GumbelLayers:
    """All layers of a block whose groups have one width and whose scales have one dtype; see `FlatLayers`.

    Args:
        initial: The layers; their codes and scales are the start exactly.
        steps: Steps in which the noise is annealed.
        seed: Seed of the noise.
        reach: How far codes may move.

    Attributes:
        logits: ``[2 reach + 1, groups, width]`` float32.
        log_change: ``[groups, 1]`` float32, logarithm of scale over starting scale.
        taken: Steps that were taken.
    """

    def __init__(self, initial: Sequence[InitialRounding], steps: int, seed: int, reach: int = 2) -> None:
        self.initial, self.steps, self.taken = initial, steps, 0
        self.stored_dtype, self.width = initial[0].rounded.scales.dtype, group_width(initial[0].rounded)
        self.key, self.distances = noise_key(seed, initial[0].name), range(-reach, reach + 1)
        self.scale_start = torch.cat([s.rounded.scales.float().view(-1, 1) for s in initial])
        self.codes = torch.cat([s.rounded.codes.reshape(-1, self.width) for s in initial])
        self.zero = torch.cat([zero_points(s.rounded).view(-1, 1) for s in initial])
        self.log_change = torch.zeros_like(self.scale_start)
        self.logits = self._start_logits()
        self.leaf = self._mean = self._levels = self._probabilities = self.scale_start

    @property
    def latents(self) -> list[Tensor]:
        """What decides the codes."""
        return [self.logits]

    def _start_logits(self) -> Tensor:
        low, high = (
            torch.cat([torch.full_like(s.rounded.scales, v, dtype=torch.int16).view(-1, 1) for s, v in bounds])
            for bounds in (
                [(s, s.quant_format.min_code) for s in self.initial],
                [(s, s.quant_format.max_code) for s in self.initial],
            )
        )
        logits = torch.empty(len(self.distances), *self.codes.shape, device=self.codes.device)
        for part, distance in zip(logits, self.distances, strict=True):
            moved = self.codes.short() + distance
            part.fill_(-LEVEL_GAP / 2 * distance**2).masked_fill_((moved < low) | (moved > high), _ABSENT)
        return logits

    @property
    def scale(self) -> Tensor:
        """``[groups, 1]`` float32."""
        return self.scale_start * self.log_change.exp()

    @property
    def _sharpening(self) -> tuple[float, float]:
        """1/τ and κ/τ at this step."""
        share = min(1.0, self.taken / max(self.steps - 1, 1))
        temperature, sharpness = (first + share * (last - first) for first, last in (TEMPERATURE, SHARPNESS))
        return 1 / temperature, sharpness / temperature

    def weights(self, dtype: torch.dtype, differentiable: bool) -> dict[str, Tensor]:
        """Weights ``[out, in]`` of every layer: soft, as differentiable views of `leaf`, or as loaders compute them."""
        if not differentiable:
            value = (self._hard_codes().float() - self.zero).to(self.stored_dtype) * self.scale.to(self.stored_dtype)
            return by_layer(self.initial, value.to(dtype))
        self.leaf = self.soft().to(dtype).requires_grad_()
        return by_layer(self.initial, self.leaf)

    def soft(self) -> Tensor:
        """Soft weights at this step, ``[groups, width]`` float32."""
        coldness, slope = self._sharpening
        likely = torch.empty_like(self.logits)
        for part, logits, noise in self._noisy_parts(likely):
            torch.add(noise * coldness, logits, alpha=slope, out=part)
        self._probabilities = torch.softmax(likely, 0)
        self._mean = torch.mul(self._probabilities[-1], self.distances[-1])
        for part, distance in zip(self._probabilities[:-1], self.distances[:-1], strict=True):
            if distance:
                self._mean.add_(part, alpha=distance)
        self._levels = (self.codes - self.zero).add_(self._mean)
        return self._levels * self.scale

    def _noisy_parts(self, likely: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Views of ``likely`` and of the logits, and the noise to be added, the same for many groups."""
        levels, groups, width = likely.shape
        tile = min(groups, max(1, _NOISE // (levels * width)))
        noise = gumbel_noise(levels * tile * width, self.key, self.taken, likely.device).view(levels, tile, width)
        whole = groups // tile * tile
        first, logits = (t[:, :whole].unflatten(1, (-1, tile)) for t in (likely, self.logits))
        yield first, logits, noise[:, None]
        if whole < groups:
            yield likely[:, whole:], self.logits[:, whole:], noise[:, : groups - whole]

    def collect(self) -> None:
        """Set the gradients of logits and log_change from that of `leaf`, where it has one, and let all three go."""
        if self.leaf.grad is not None:
            self.collect_from(self.leaf.grad)
        self.leaf = self._mean = self._levels = self._probabilities = self.scale_start

    def collect_from(self, gradient: Tensor) -> None:
        """Set the gradients of logits and log_change from that of the latest soft weights, ``[groups, width]``."""
        along = gradient.float() * self.scale
        self.log_change.grad = self._levels.mul_(along).sum(-1, keepdim=True)
        _, slope = self._sharpening
        self.logits.grad = logit_gradients(self._probabilities, self.distances, self._mean, along.mul_(-slope))

    def confine(self) -> None:
        """Keep what moved within its limits, and go on to the next step's noise."""
        self.log_change.clamp_(-MAX_SCALE_CHANGE, MAX_SCALE_CHANGE)
        self.taken += 1

    def _hard_codes(self) -> Tensor:
        """The likeliest codes without noise, ``[groups, width]`` int8; the lowest of equals.

        A maximum along the first axis took a CPU as long as twenty steps.
        """
        most, moved = self.logits[0], torch.full_like(self.codes, self.distances[0])
        for part, distance in zip(self.logits[1:], self.distances[1:], strict=True):
            moved.masked_fill_(part > most, distance)
            most = torch.maximum(part, most)
        return moved.add_(self.codes)

    def rounded(self) -> dict[str, Quantized]:
        """Codes, scales and zero points of every layer as they are now."""
        counts = [s.rounded.scales.numel() for s in self.initial]
        parts = zip(self._hard_codes().split(counts), self.scale.to(self.stored_dtype).split(counts), strict=True)
        return {
            s.name: Quantized(c.reshape(s.rounded.codes.shape), f.reshape(s.rounded.scales.shape), s.rounded.zeros)
            for s, (c, f) in zip(self.initial, parts, strict=True)
        }


class SignMomentum(torch.optim.Optimizer):
    """Lion without weight decay: steps of one length along the sign of a mean of gradients.

    Args:
        groups: Parameters with their ``lr``.
    """

    def __init__(self, groups: Iterable[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """θ ← θ - rate sign(β₁ m + (1 - β₁) g), then m ← β₂ m + (1 - β₂) g."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                direction = torch.lerp(mean, parameter.grad, 1 - BETAS[0]).sign_()
                parameter.add_(direction, alpha=-group["lr"])
                mean.lerp_(parameter.grad, 1 - BETAS[1])
