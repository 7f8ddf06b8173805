"""Random-sign Hadamard rotations, applied in float64 by sums whose order is the same on every device."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KIND = "hadamard"
VERSION = 1
"""Of the numbers that a seed stands for."""

MAX_ODD = 1023
"""Largest odd factor of a size: its part of the transform takes that many products per weight."""


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrix ``Q = diag(signs) (M x H)`` of a seed, a Kronecker product of small orthogonal matrices.

    H is the Hadamard matrix of order 2^k divided by its norm, M the Hartley matrix of odd order m with entries
    ``(cos + sin)(2 pi i j / m) / sqrt(m)``; both are symmetric, so that ``Q^T = (M x H) diag(signs)``. Signs are bits
    of SHA-256, hence the same with every version of every library (QuaRot, 2404.00456, for the signs and orders).

    Args:
        size: Channels ``2^k m``.
        seed: Chooses the signs.
    """

    size: int
    seed: int

    def record(self) -> dict[str, Any]:
        """What the rotation is made from again."""
        return {"kind": KIND, "seed": self.seed, "version": VERSION, "channels": self.size}

    @property
    def odd(self) -> int:
        """The odd factor m of the size."""
        return self.size // (self.size & -self.size)

    @cached_property
    def signs(self) -> Tensor:
        """``[size]`` float64 of 1 and -1."""
        import torch

        bits: list[int] = []
        for number in range(-(-self.size // 256)):
            text = f"hawqtool rotation {VERSION} {self.seed} {self.size} {number}"
            block = int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")
            bits += [block >> place & 1 for place in range(256)]
        return 1 - 2 * torch.tensor(bits[: self.size], dtype=torch.float64)

    @cached_property
    def waves(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``2 pi i k / m`` over sqrt(m) for i, k from 1 to (m - 1) / 2, float64."""
        import torch

        m = self.odd
        angles = [2 * math.pi * step / m for step in range(m)]
        numbers = range(1, m // 2 + 1)
        cosines = [[math.cos(angles[i * k % m]) / math.sqrt(m) for k in numbers] for i in numbers]
        sines = [[math.sin(angles[i * k % m]) / math.sqrt(m) for k in numbers] for i in numbers]
        return torch.tensor(cosines, dtype=torch.float64), torch.tensor(sines, dtype=torch.float64)

    def apply(self, rows: Tensor) -> Tensor:
        """``rows @ Q``, each block of `size` channels apart.

        Args:
            rows: ``[..., n * size]`` of any floating dtype.

        Returns:
            Tensor of that shape, float64.
        """
        shape = rows.shape
        return self._orders(rows.double().reshape(-1, self.size) * self.signs_on(rows.device)).reshape(shape)

    def undo(self, rows: Tensor) -> Tensor:
        """``rows @ Q^T``, the inverse of `apply`."""
        shape = rows.shape
        return (self._orders(rows.double().reshape(-1, self.size)) * self.signs_on(rows.device)).reshape(shape)

    def _orders(self, x: Tensor) -> Tensor:
        """``x (M x H)`` for ``[rows, size]``: butterflies over 2^k, then weighted sums over m, one addition a step.

        Compiled code on a CPU is 10 to 20 times faster than torch's operations, whose bits are the same.
        """
        import torch

        if x.device.type != "cpu":
            return self.mix_columns(x.t().clone(memory_format=torch.contiguous_format)).t()
        from hawqtool.checkpoint.rotated.transform import turn

        turned, half = x.contiguous().clone(), self.odd // 2
        turn(turned.numpy(), self.size // self.odd, torch.stack(self.waves).reshape(2, half, half).numpy())
        return turned

    def mix_columns(self, x: Tensor) -> Tensor:
        """``(M x H) x`` by torch's operations, with the bits that compiled code has: those of every single addition.

        Each operation is a kernel of its own, which rounds once, so nothing is fused into a sum; and the columns lie
        side by side, so a GPU reads and writes whole lines.

        Args:
            x: ``[n * size, columns]`` float64, contiguous, blocks of `size` rows each by itself; used up.

        Returns:
            Tensor of that shape.
        """
        import torch

        shape, other, width = x.shape, torch.empty_like(x), 1
        power = self.size // self.odd
        while width < power:
            (low, high), (total, difference) = (values.view(-1, 2, width, shape[1]).unbind(1) for values in (x, other))
            torch.add(low, high, out=total)
            torch.sub(low, high, out=difference)
            x, other, width = other, x, 2 * width
        x.mul_(1 / math.sqrt(power))
        return x if self.odd == 1 else self._hartley(x.view(-1, self.odd, power * shape[1])).reshape(shape)

    def _hartley(self, x: Tensor) -> Tensor:
        """M over the second of three dimensions; terms k and m - k have one cosine and opposite sines."""
        import torch

        half, unit = self.odd // 2, 1 / math.sqrt(self.odd)
        cosines, sines = self._waves_on(x.device)
        first, low, high = x[:, :1], x[:, 1 : half + 1], x[:, half + 1 :].flip(1)
        even, odd = low + high, low - high
        total, first = first.clone(), first * unit
        same, opposite = first.expand_as(low).clone(), torch.zeros_like(low)
        for k in range(half):
            total += even[:, k : k + 1]
            same += even[:, k : k + 1] * cosines[:, k, None]
            opposite += odd[:, k : k + 1] * sines[:, k, None]
        return torch.cat((total * unit, same + opposite, (same - opposite).flip(1)), 1)

    def signs_on(self, device: torch.device) -> Tensor:
        """`signs` on a device, copied there once."""
        known = self._copies.get((device, "signs"))
        if known is None:
            known = self._copies[device, "signs"] = (self.signs.to(device),)
        return known[0]

    def _waves_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """`waves` on a device, copied there once."""
        known = self._copies.get((device, "waves"))
        if known is None:
            known = self._copies[device, "waves"] = tuple(values.to(device) for values in self.waves)
        return known

    @cached_property
    def _copies(self) -> dict[tuple[torch.device, str], tuple[Tensor, ...]]:
        return {}
