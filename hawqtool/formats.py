"""Weight formats and the exact bytes that they take on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass

ASYMMETRIC_PROFILES = ("vllm", "transformers")
"""Profiles that take grids with zero points; transformers only in versions that docs/guides/load.md names."""

MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZES = (128, 64, 32)
"""Group sizes that the kernels of serving engines take; each divides those before it."""

GROUP_STEP = 16
"""Other group sizes are multiples of it."""

CHANNEL = 0
"""``group_size`` of a format with one scale per output channel."""

BLOCK_LABELS = (
    *("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"),
    *("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
)
"""Block types of GGUF that hawqtool writes, blocks of 256 first; `hawqtool.checkpoint.gguf` has their layouts."""

SHAPE_TENSOR_BYTES = 16
"""Bytes of the ``weight_shape`` tensor (two int64) that accompanies every packed weight."""


@dataclass(frozen=True, order=True)
class QuantFormat:
    """A uniform integer grid: ``bits`` per code, one scale per ``group_size`` inputs of a row.

    A weight is scale * code, or scale * (code - zero) on an asymmetric grid, whose zero is an integer in the range
    of the codes.

    Args:
        bits: Width of a code, 2 to 8.
        group_size: Inputs that share a scale; ``CHANNEL`` (0) means the whole row.
        symmetric: Whether the grid has no zero points.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def label(self) -> str:
        """Short name such as ``w3g64`` or ``w4ch``; ``w3g64a`` and ``w4cha`` have zero points."""
        groups = f"g{self.group_size}" if self.group_size else "ch"
        return f"w{self.bits}{groups}" + ("" if self.symmetric else "a")

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

    def packed_columns(self, in_features: int) -> int:
        """int32 words per packed row: the dense little-endian bit stream, ceil(in * bits / 32)."""
        return -(-in_features * self.bits // 32)

    def packed_zero_rows(self, out_features: int) -> int:
        """int32 words per group of the packed zero points, which lie along the rows; 0 for a symmetric grid."""
        return 0 if self.symmetric else -(-out_features * self.bits // 32)

    def stored_bytes(self, out_features: int, in_features: int, scale_bytes: int) -> int:
        """Bytes of packed codes, scales and packed zero points of a ``[out, in]`` weight, without ``weight_shape``.

        Args:
            out_features: Rows.
            in_features: Columns.
            scale_bytes: Bytes of one scale, 2 for bf16 and fp16 sources, 4 for fp32.
        """
        groups = self.num_groups(in_features)
        words = out_features * self.packed_columns(in_features) + self.packed_zero_rows(out_features) * groups
        return 4 * words + out_features * groups * scale_bytes


def parse_label(label: str) -> QuantFormat:
    """Inverse of `QuantFormat.label`.

    Raises:
        ValueError: If the label is malformed or the width is out of range.
    """
    match = re.fullmatch(r"w(\d)(?:g([1-9]\d*)|ch)(a?)", label)
    if not match or not MIN_BITS <= int(match[1]) <= MAX_BITS:
        raise ValueError(f"{label!r} is not a format label such as w3g64 or w4ch (widths 2 to 8)")
    return QuantFormat(int(match[1]), int(match[2] or CHANNEL), symmetric=not match[3])


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
