"""Row format: the tensors that a model reads of one row, in one tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_TOKEN = 1 << 24
"""float32 holds all smaller integers exactly."""

_EXAMPLE_SAMPLES, _EXAMPLE_FRAMES = 4320, 720
"""Samples, or frames of a spectrum, of an example row where the length is free: multiples of the positions of both
traced runs, samples also of the 80 of a frame."""

SOUNDS = ("input_values", "input_features")
"""Arguments that take sounds: samples, or the bands of a spectrum over time."""

IMAGES = "pixel_values"


@dataclass(frozen=True)
class RowFormat:
    """What a model reads of one row.

    Args:
        tokens: Argument that takes tokens; None where a model reads none.
        values: Argument that takes an image or a sound; None where a model reads tokens alone.
        shape: Shape of the values of one row, with -1 for a length that is free; None where any shape is read.
        image: Tokens that stand for the image in a row of a language model, before its text.
    """

    tokens: str | None
    values: str | None = None
    shape: tuple[int, ...] | None = None
    image: tuple[int, ...] = ()

    @property
    def is_joint(self) -> bool:
        """Whether a row holds tokens and values."""
        return self.tokens is not None and self.values is not None

    @property
    def kind(self) -> str:
        """What a row is, in words."""
        if self.values is None:
            return "tokens"
        name = "images" if self.values == IMAGES else "sounds"
        return name if self.tokens is None else f"{name} with tokens"

    def join(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Rows of both: ``[rows, positions, 1 + n]`` float32, a token at each position and the values behind them.

        Values are laid out position by position, filled up with zeros.

        Args:
            tokens: ``[rows, positions]`` int64.
            values: ``[rows, ...]`` floating point.
        """
        if tokens.numel() and int(tokens.max()) >= _LARGEST_TOKEN:
            raise ValueError(f"token {int(tokens.max())}; expected less than {_LARGEST_TOKEN}")
        rows, positions = tokens.shape
        flat = values.float().reshape(rows, -1)
        flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % positions))
        return torch.cat([tokens.float()[..., None], flat.view(rows, positions, -1)], -1)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Tokens, int64 ``[rows, positions]``, and values in the rows' dtype by argument, from what `join` gives.

        A free length comes back with the zeros that were filled up, which are fewer than there are positions.
        """
        assert self.tokens is not None and self.values is not None and self.shape is not None
        flat = rows[..., 1:].reshape(len(rows), -1)
        fixed = torch.Size(size for size in self.shape if size > 0).numel()
        count = flat.shape[1] // fixed * fixed if -1 in self.shape else fixed
        return {self.tokens: rows[..., 0].long(), self.values: flat[:, :count].reshape(len(rows), *self.shape)}

    def example(self, rows: int, positions: int, token: int, dtype: torch.dtype) -> Tensor:
        """Rows of zeros and of one token, or of ones and the tokens of an image before it, as a model takes them."""
        tokens = torch.cat([torch.tensor(self.image), torch.full((positions,), token)]).long().expand(rows, -1)
        if self.values is None:
            return tokens
        assert self.shape is not None
        free = _EXAMPLE_SAMPLES if len(self.shape) == 1 else _EXAMPLE_FRAMES
        # Language models pass over images of zeros, which fill up lists.
        filler = float(bool(self.image))
        values = torch.full((rows, *(free if size < 0 else size for size in self.shape)), filler, dtype=dtype)
        return values if self.tokens is None else self.join(tokens, values).to(dtype)
