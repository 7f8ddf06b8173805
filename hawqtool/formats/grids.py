"""Weight grids of floats: values that a code may be, who shares a scale, how both are stored.

Layouts are those of compressed-tensors 0.18, which vLLM and transformers read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

ScaleKind = Literal["model", "e4m3", "e8m0"]
"""How scales are stored: in the dtype of the model, as E4M3 over one divisor of the tensor, or as powers of two."""

_BYTES = {"F8_E4M3": 1, "I8": 1, "U8": 1, "F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2}


class StoredPart(NamedTuple):
    """A stored tensor of a quantized weight.

    Args:
        suffix: What follows the module's name, such as ``.weight_scale``.
        dtype: Safetensors name of its dtype.
        shape: Its dimensions.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class WeightGrid:
    """A grid of floats: value = code * scale, the code a number of E4M3 or E2M1.

    Args:
        name: Label without activations.
        element: Name of the values that codes may have (see `hawqtool.rounding.floats.elements`).
        bits: Bits of a code.
        group_size: Inputs that share a scale; 0 for a whole row.
        group_rows: Rows that share it.
        scale: How scales are stored.
        layout: ``format`` of compressed-tensors.
    """

    name: str
    element: Literal["e4m3", "e2m1"]
    bits: int
    group_size: int
    group_rows: int
    scale: ScaleKind
    layout: str

    @property
    def stored_scale(self) -> str | None:
        """Safetensors dtype of a scale; None for that of the model."""
        return {"model": None, "e4m3": "F8_E4M3", "e8m0": "U8"}[self.scale]

    def divides(self, out_features: int, in_features: int) -> bool:
        """Whether groups cover a ``[out, in]`` weight exactly, and loaders see from its shapes that they do."""
        if self.group_rows > 1 and in_features == self.group_size and out_features != self.group_rows:
            return False  # compressed-tensors takes one scale a block of rows for one a row, and fails
        return in_features % (self.group_size or 1) == 0 and out_features % self.group_rows == 0

    def parts(self, out_features: int, in_features: int, scale_dtype: str) -> tuple[StoredPart, ...]:
        """Stored tensors of a ``[out, in]`` weight that the groups divide.

        Args:
            out_features: Rows.
            in_features: Columns.
            scale_dtype: Safetensors dtype of the model's weights.
        """
        groups = in_features // self.group_size if self.group_size else 1
        codes = (
            StoredPart(".weight_packed", "U8", (out_features, in_features // 2))
            if self.element == "e2m1"
            else StoredPart(".weight", "F8_E4M3", (out_features, in_features))
        )
        scales = StoredPart(
            ".weight_scale", self.stored_scale or scale_dtype, (out_features // self.group_rows, groups)
        )
        divisor = [StoredPart(".weight_global_scale", "F32", (1,))] if self.scale == "e4m3" else []
        return (codes, scales, *divisor)


GRIDS = {
    grid.name: grid
    for grid in (
        WeightGrid("fp8", "e4m3", 8, 0, 1, "model", "float-quantized"),
        WeightGrid("fp8b128", "e4m3", 8, 128, 128, "model", "float-quantized"),
        WeightGrid("nvfp4", "e2m1", 4, 16, 1, "e4m3", "nvfp4-pack-quantized"),
        WeightGrid("mxfp4", "e2m1", 4, 32, 1, "e8m0", "mxfp4-pack-quantized"),
        WeightGrid("mxfp8", "e4m3", 8, 32, 1, "e8m0", "mxfp8-quantized"),
    )
}
"""Grids of floats by name. Scales per block need rows and columns of whole blocks: loaders guess them from shapes."""
