"""Weight formats and the exact bytes that they take on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hawqtool.formats.activations import ACTIVATIONS, ActivationFormat
from hawqtool.formats.grids import GRIDS, StoredPart, WeightGrid

ASYMMETRIC_PROFILES = ("vllm", "transformers")
"""Profiles that take grids with zero points; transformers only in versions that docs/guides/load.md names."""

MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZES = (128, 64, 32)
"""Group sizes that the kernels of serving engines take; each divides those before it."""

GROUP_STEP = 16
"""Other group sizes are multiples of it."""

CHANNEL = 0
"""``group_size`` of a format with one scale per output channel."""

UNQUANTIZED = "16"
"""Label of a unit that stays as it is, in the bytes of the original."""

BLOCK_LABELS = (
    *("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"),
    *("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
)
"""Block types of GGUF that hawqtool writes, blocks of 256 first; `hawqtool.checkpoint.gguf` has their layouts."""

PACK_QUANTIZED, INT_QUANTIZED = "pack-quantized", "int-quantized"
"""Layouts of integers: dense bit streams, and a byte per code."""

_NVFP4_SCALES = 0.5
"""Bits of a weight's part of an E4M3 scale that 16 weights share."""

SHAPE_TENSOR_BYTES = 16
"""Bytes of the ``weight_shape`` tensor (two int64) that accompanies every packed weight."""


@dataclass(frozen=True, order=True)
class QuantFormat:
    """A weight grid, of integers or of floats, and how an engine rounds the inputs of the layer.

    On a grid of integers a weight is scale * code, or scale * (code - zero) where there are zero points, which are
    integers in the range of the codes; on a grid of floats it is scale * code, the code a small float.

    Args:
        bits: Width of a code, 2 to 8; 16 for weights that stay, whatever the dtype of the model.
        group_size: Inputs that share a scale; ``CHANNEL`` (0) means the whole row.
        symmetric: Whether the grid has no zero points.
        grid: Name of a grid of floats (see `GRIDS`); empty for integers; `UNQUANTIZED` for weights that stay.
        activations: What follows the ``-`` of the label where inputs are rounded too; else empty.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    grid: str = ""
    activations: str = ""

    @property
    def label(self) -> str:
        """Short name such as ``w3g64``, ``w4ch`` or ``nvfp4``; ``w3g64a`` has zero points, ``fp8-a8f`` FP8 inputs."""
        groups = f"g{self.group_size}" if self.group_size else "ch"
        weights = self.grid or f"w{self.bits}{groups}" + ("" if self.symmetric else "a")
        return f"{weights}-{self.activations}" if self.activations else weights

    @property
    def effective_bits(self) -> float:
        """Bits as NVIDIA's ModelOpt counts them for its budget: scales count in NVFP4 alone, at half a bit."""
        return self.bits + _NVFP4_SCALES if self.grid == "nvfp4" else float(self.bits)

    @property
    def floats(self) -> WeightGrid | None:
        """The grid of floats; None for integers, and for what stays as it is."""
        return GRIDS.get(self.grid)

    @property
    def is_unquantized(self) -> bool:
        """Whether a layer keeps its weights: nothing is rounded, and an engine reads them as they are."""
        return self.grid == UNQUANTIZED

    @property
    def is_plain(self) -> bool:
        """Whether it is a grid of integers with inputs as they are, of which ``bits`` and ``group_size`` say all."""
        return not self.grid and not self.activations

    @property
    def activation_format(self) -> ActivationFormat | None:
        """How inputs are rounded; None where they stay as they are."""
        return ACTIVATIONS[self.label] if self.activations else None

    @property
    def has_input_divisor(self) -> bool:
        """Whether something of its inputs is stored, for which calibration rows are needed."""
        return bool(self.activations) and ACTIVATIONS[self.label].has_divisor

    @property
    def layout(self) -> str:
        """``format`` of compressed-tensors: how codes are stored."""
        if self.floats is not None:
            return self.floats.layout
        return INT_QUANTIZED if self.activations == "a8i" else PACK_QUANTIZED

    @property
    def keeps_name(self) -> bool:
        """Whether codes, or weights, are stored under the weight's own name; else as packed ones."""
        if self.is_unquantized:
            return True
        return self.floats.element == "e4m3" if self.floats else self.layout == INT_QUANTIZED

    @property
    def min_code(self) -> int:
        """Smallest signed code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def max_code(self) -> int:
        """Largest signed code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, in_features: int) -> int:
        """Scales per row of a weight with ``in_features`` columns."""
        return in_features // self.group_size if self.group_size else 1

    def group_width(self, in_features: int) -> int:
        """Inputs that share one scale."""
        return self.group_size or in_features

    def divides(self, in_features: int) -> bool:
        """Whether the groups cover a row exactly."""
        return self.group_size == CHANNEL or in_features % self.group_size == 0

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether the groups cover a ``[out, in]`` weight exactly."""
        return self.floats.divides(out_features, in_features) if self.floats else self.divides(in_features)

    def parts(self, out_features: int, in_features: int, scale_dtype: str) -> tuple[StoredPart, ...]:
        """Stored tensors of a ``[out, in]`` weight.

        Args:
            out_features: Rows.
            in_features: Columns.
            scale_dtype: Safetensors dtype of the source's weight, in which scales of integers are stored.
        """
        if self.floats is not None:
            found = self.floats.parts(out_features, in_features, scale_dtype)
            return (*found, StoredPart(".input_global_scale", "F32", (1,))) if self.has_input_divisor else found
        if self.is_unquantized:
            return (StoredPart(".weight", scale_dtype, (out_features, in_features)),)
        groups = self.num_groups(in_features)
        scales = StoredPart(".weight_scale", scale_dtype, (out_features, groups))
        if self.layout == INT_QUANTIZED:
            return StoredPart(".weight", "I8", (out_features, in_features)), scales
        codes = StoredPart(".weight_packed", "I32", (out_features, self.packed_columns(in_features)))
        packed = (codes, scales, StoredPart(".weight_shape", "I64", (2,)))
        if self.symmetric:
            return packed
        return *packed, StoredPart(".weight_zero_point", "I32", (self.packed_zero_rows(out_features), groups))

    def packed_columns(self, in_features: int) -> int:
        """int32 words per packed row: the dense little-endian bit stream, ceil(in * bits / 32)."""
        return -(-in_features * self.bits // 32)

    def packed_zero_rows(self, out_features: int) -> int:
        """int32 words per group of the packed zero points, which lie along the rows; 0 for a symmetric grid."""
        return 0 if self.symmetric else -(-out_features * self.bits // 32)

    def stored_bytes(self, out_features: int, in_features: int, scale_bytes: int) -> int:
        """Bytes of all stored tensors of a ``[out, in]`` weight but ``weight_shape``.

        Args:
            out_features: Rows.
            in_features: Columns.
            scale_bytes: Bytes of one scale of integers, 2 for bf16 and fp16 sources, 4 for fp32.
        """
        parts = self.parts(out_features, in_features, "F32" if scale_bytes == 4 else "BF16")
        return sum(part.num_bytes for part in parts if part.suffix != ".weight_shape")


def parse_label(label: str) -> QuantFormat:
    """Inverse of `QuantFormat.label`.

    Raises:
        ValueError: If the label is malformed or the width is out of range.
    """
    if label == UNQUANTIZED:
        return QuantFormat(16, CHANNEL, True, UNQUANTIZED)
    weights, _, activations = label.partition("-")
    if activations and label not in ACTIVATIONS:
        raise ValueError(
            f"{label!r} is not a format that engines run; with activations there are {', '.join(ACTIVATIONS)}"
        )
    if weights in GRIDS:
        return QuantFormat(GRIDS[weights].bits, GRIDS[weights].group_size, True, weights, activations)
    match = re.fullmatch(r"w(\d)(?:g([1-9]\d*)|ch)(a?)", weights)
    if not match or not MIN_BITS <= int(match[1]) <= MAX_BITS:
        floats = ", ".join(GRIDS)
        raise ValueError(f"{label!r} is not a format label such as w3g64 or w4ch (widths 2 to 8), nor one of {floats}")
    return QuantFormat(int(match[1]), int(match[2] or CHANNEL), not match[3], "", activations)


def names_width(label: str) -> bool:
    """Whether a label of a menu names a width alone, such as ``w4``, in every group size that engines load."""
    return re.fullmatch(r"w\d", label) is not None


def is_served(group_size: int) -> bool:
    """Whether the kernels of serving engines take a group size; transformers takes every one."""
    return group_size == CHANNEL or group_size in GROUP_SIZES


def group_sizes_tried(requested: int) -> tuple[int, ...]:
    """The requested group size, then the smaller ones of `GROUP_SIZES`, to which it falls where it does not divide."""
    return (requested, *(size for size in GROUP_SIZES if size < requested))


def fitting_group_size(requested: int, *in_features: int) -> int | None:
    """The first of `group_sizes_tried` that divides all widths.

    Returns:
        The group size, ``CHANNEL`` when that was requested, or None when nothing fits.
    """
    if requested == CHANNEL:
        return CHANNEL
    fitting = (size for size in group_sizes_tried(requested) if all(width % size == 0 for width in in_features))
    return next(fitting, None)


def asymmetric_refusal(profile: str) -> str:
    """Why a profile does not take asymmetric grids, and which do."""
    return (
        f"profile {profile} takes symmetric grids only: transformers 5.23 fails to load the zero points of asymmetric "
        "ones, and SGLang takes them at 4 bits only; --profile vllm accepts them (and --profile transformers, for 5.17)"
    )


def group_size_refusal(group_size: int) -> str:
    """Why a group size is not for every profile."""
    return (
        f"groups of {group_size} load in transformers alone: kernels of serving engines take 32, 64, 128 and whole "
        "rows; use one of these, or --profile transformers"
    )
