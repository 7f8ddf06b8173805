"""Activation formats: how an engine rounds the inputs of a layer while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hawqtool.formats.grids import ScaleKind


@dataclass(frozen=True)
class ActivationFormat:
    """Rounding of a layer's inputs with scales that are computed while the model runs, in part over a stored divisor.

    Args:
        name: Name of the kind.
        element: Name of the values that codes may have: ``int8``, ``e4m3`` or ``e2m1``.
        group_size: Inputs of a token that share a scale; 0 for all of them.
        scale: How scales are rounded: not beyond the dtype of the inputs, to E4M3 over one divisor, to powers of two.
        divisor: That of E4M3 scales, which is found on calibration rows and stored with a layer; None before that, and
            for other scales.
    """

    name: str
    element: Literal["int8", "e4m3", "e2m1"]
    group_size: int
    scale: ScaleKind = "model"
    divisor: float | None = None

    @property
    def has_divisor(self) -> bool:
        """Whether something of it is stored, hence found on calibration rows: the divisor of its scales."""
        return self.scale == "e4m3"

    @property
    def entry(self) -> dict[str, Any]:
        """``input_activations`` of a config group of compressed-tensors."""
        entry: dict[str, Any] = {
            "num_bits": 4 if self.element == "e2m1" else 8,
            "type": "int" if self.element == "int8" else "float",
            "symmetric": True,
            "strategy": "group" if self.group_size else "token",
            "dynamic": "local" if self.has_divisor else True,
        }
        if self.group_size:
            entry["group_size"] = self.group_size
        if self.has_divisor:
            dtype = "torch.float8_e4m3fn"
            entry |= {"strategy": "tensor_group", "scale_dtype": dtype, "zp_dtype": dtype}
        elif self.scale == "e8m0":
            entry |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        return entry


INT8_TOKEN = ActivationFormat("int8 per token", "int8", 0)
FP8_TOKEN = ActivationFormat("FP8 per token", "e4m3", 0)
FP8_GROUP = ActivationFormat("FP8 per 128 inputs of a token", "e4m3", 128)
MXFP8 = ActivationFormat("MXFP8", "e4m3", 32, "e8m0")
MXFP4 = ActivationFormat("MXFP4", "e2m1", 32, "e8m0")
NVFP4 = ActivationFormat("NVFP4", "e2m1", 16, "e4m3")

ACTIVATIONS = {
    "w8ch-a8i": INT8_TOKEN,
    "w4g128-a8f": FP8_TOKEN,
    "fp8-a8f": FP8_TOKEN,
    "fp8b128-a8f": FP8_GROUP,
    "mxfp8-a8": MXFP8,
    "mxfp4-a4": MXFP4,
    "nvfp4-a4": NVFP4,
}
"""Formats that round activations, by label: the pairs of weights and activations that an engine runs."""
