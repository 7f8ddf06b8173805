"""Pack the tensors that are alive between two blocks into one tensor per batch, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

_BYTE_SCALE = 2.0**-20
"""Bytes of integers are packed times this: exact in any floating dtype, and too small to count in errors of outputs."""

LeafName = tuple[int, int]
"""Number of the block that gives a tensor, -1 for the first block's input, and the tensor's place among its outputs."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that is handed on.

    Args:
        name: Its name.
        shape: Its shape for one row.
        dtype: Its dtype.
        row: Dimension of the rows.
        token: Dimension of the positions; None where it has none.
    """

    name: LeafName
    shape: tuple[int, ...]
    dtype: torch.dtype
    row: int
    token: int | None

    @property
    def _order(self) -> tuple[int, ...]:
        """Dimensions with rows, then positions first."""
        front = (self.row,) if self.token is None else (self.row, self.token)
        return (*front, *(d for d in range(len(self.shape)) if d not in front))

    def of_rows(self, rows: int) -> tuple[int, ...]:
        """Its shape for so many rows."""
        return (*self.shape[: self.row], rows, *self.shape[self.row + 1 :])

    def zeros(self, device: torch.device) -> Tensor:
        """Zeros of its shape for one row."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)

    def width(self, positions: int) -> int:
        """Numbers per position that it takes when it is packed."""
        numbers = torch.Size(self.shape).numel() * (1 if self.dtype.is_floating_point else self.dtype.itemsize)
        return -(-numbers // positions)

    def packed(self, tensor: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
        """``[rows, positions, width]`` in a floating dtype; integers go byte by byte, so that each stays exact."""
        rows = tensor.shape[self.row]
        first = tensor.permute(self._order)
        if not self.dtype.is_floating_point:
            first = first.reshape(rows, positions if self.token is not None else 1, -1).contiguous().view(torch.uint8)
            first = first.to(dtype) * _BYTE_SCALE
        if self.token is not None:
            return (first if first.ndim == 3 else first.reshape(rows, positions, -1)).to(dtype)
        flat = first.reshape(rows, -1).to(dtype)
        padding = self.width(positions) * positions - flat.shape[1]
        return torch.nn.functional.pad(flat, (0, padding)).reshape(rows, positions, -1)

    def unpacked(self, packed: Tensor) -> Tensor:
        """The tensor from what `packed` gives."""
        rows, order = len(packed), self._order
        whole = self.of_rows(rows)
        values = packed
        if self.token is None:
            size = torch.Size(self.shape).numel() * (1 if self.dtype.is_floating_point else self.dtype.itemsize)
            values = packed.reshape(rows, -1)[:, :size]
        if self.dtype.is_floating_point:
            values = values.to(self.dtype)
        else:
            values = (values.detach() / _BYTE_SCALE).to(torch.uint8).contiguous().view(self.dtype)
        if order == tuple(range(len(whole))) and tuple(values.shape) == whole:
            return values
        back = sorted(range(len(order)), key=lambda d: order[d])
        return values.reshape([whole[d] for d in order]).permute(back)


@dataclass(frozen=True)
class Layout:
    """What is alive between two blocks, for rows of one length.

    Args:
        leaves: Its tensors in order.
        positions: Positions of a row.
    """

    leaves: tuple[Leaf, ...]
    positions: int

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype that holds every tensor exactly."""
        floats = [leaf.dtype for leaf in self.leaves if leaf.dtype.is_floating_point]
        return reduce(torch.promote_types, floats)

    @property
    def width(self) -> int:
        """Numbers per position."""
        return sum(leaf.width(self.positions) for leaf in self.leaves)

    def pack(self, values: Mapping[LeafName, Tensor]) -> Tensor:
        """``[rows, positions, width]`` from the tensors by name; a single ``[rows, positions, n]`` stays what it is."""
        parts = [leaf.packed(values[leaf.name], self.positions, self.dtype) for leaf in self.leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def unpack(self, packed: Tensor) -> dict[LeafName, Tensor]:
        """The tensors by name, as views where that can be, through which gradients flow."""
        parts = packed.split([leaf.width(self.positions) for leaf in self.leaves], -1)
        return {leaf.name: leaf.unpacked(part) for leaf, part in zip(self.leaves, parts, strict=True)}
