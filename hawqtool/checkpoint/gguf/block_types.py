"""Block types of GGUF: what a block of weights holds, and its exact bytes.

A row of a matrix is cut into blocks of 32 or 256 weights, each with its own fp16 scale. In the larger ones (K types)
every sub-block of 16 or 32 weights has a small integer scale besides, and in some an integer minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Values of the sixteen codes of IQ4_NL and IQ4_XS, in units of the scale; none of them is zero."""


@dataclass(frozen=True, order=True)
class StoredType:
    """A type of the tensor table, ours to write or not.

    Args:
        name: As llama.cpp has it, such as ``Q4_K``.
        number: Its number in the file.
        block_size: Weights of a block.
        block_bytes: Bytes of a block.
    """

    name: str
    number: int
    block_size: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.block_bytes / self.block_size

    def num_bytes(self, weights: int) -> int:
        """Bytes of so many weights, whose rows are whole blocks."""
        return weights // self.block_size * self.block_bytes


@dataclass(frozen=True, order=True)
class BlockType(StoredType):
    """A weight grid of GGUF: w = step * value(code) + offset, with a step and an offset per sub-block.

    Args:
        group_size: Weights that share a step: a sub-block, or the whole block.
        min_code: Smallest code.
        max_code: Largest code.
        scale_codes: Smallest and largest integer scale of a sub-block; None where a block has one fp16 scale alone.
        max_minimum: Largest integer minimum of a sub-block; 0 where there are none.
        has_minimum: Whether the grid has an offset: an fp16 number, or an integer under an fp16 scale.
        values: Values of the codes from `min_code` on; None where each code is its own value.
    """

    group_size: int
    min_code: int
    max_code: int
    scale_codes: tuple[int, int] | None = None
    max_minimum: int = 0
    has_minimum: bool = False
    values: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        """Name in plans and scores, as llama.cpp has it."""
        return self.name

    @property
    def activation_format(self) -> None:
        """How inputs are rounded: not in the file, llama.cpp decides it where it runs."""
        return None

    @property
    def symmetric(self) -> bool:
        """Whether there is no offset."""
        return not self.has_minimum

    @property
    def codebook(self) -> tuple[int, ...]:
        """Values of the codes in units of the step, ascending."""
        return self.values or tuple(range(self.min_code, self.max_code + 1))

    def num_groups(self, in_features: int) -> int:
        """Steps of a row."""
        return in_features // self.group_size

    def group_width(self, in_features: int) -> int:
        """Inputs that share a step, whatever the width of a row."""
        return self.group_size

    def divides(self, in_features: int) -> bool:
        """Whether blocks cover a row exactly; llama.cpp loads no other."""
        return in_features % self.block_size == 0

    def stored_bytes(self, out_features: int, in_features: int, scale_bytes: int = 2) -> int:
        """Bytes of a ``[out, in]`` weight; ``scale_bytes`` has no say, as scales of blocks are fp16 in all models."""
        return self.num_bytes(out_features * in_features)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 2, 32, 18, 32, -8, 7),
        BlockType("Q4_1", 3, 32, 20, 32, 0, 15, has_minimum=True),
        BlockType("Q5_0", 6, 32, 22, 32, -16, 15),
        BlockType("Q5_1", 7, 32, 24, 32, 0, 31, has_minimum=True),
        BlockType("Q8_0", 8, 32, 34, 32, -128, 127),
        BlockType("Q2_K", 10, 256, 84, 16, 0, 3, (0, 15), 15, has_minimum=True),
        BlockType("Q3_K", 11, 256, 110, 16, -4, 3, (-32, 31)),
        BlockType("Q4_K", 12, 256, 144, 32, 0, 15, (0, 63), 63, has_minimum=True),
        BlockType("Q5_K", 13, 256, 176, 32, 0, 31, (0, 63), 63, has_minimum=True),
        BlockType("Q6_K", 14, 256, 210, 16, -32, 31, (-128, 127)),
        BlockType("IQ4_NL", 20, 32, 18, 32, 0, 15, values=IQ4_VALUES),
        BlockType("IQ4_XS", 23, 256, 136, 32, 0, 15, (-32, 31), values=IQ4_VALUES),
    )
}
"""Types that hawqtool writes and reads, by name."""

_OTHERS = (
    *(("F32", 0, 1, 4), ("F16", 1, 1, 2), ("BF16", 30, 1, 2), ("F64", 28, 1, 8)),
    *(("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8)),
    *(("Q8_1", 9, 32, 40), ("Q8_K", 15, 256, 292), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74)),
    *(("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82)),
    *(("IQ1_M", 29, 256, 56), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17)),
    *(("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18)),
)

STORED_TYPES = {kind.number: kind for kind in (*(StoredType(*row) for row in _OTHERS), *BLOCK_TYPES.values())}
"""Every type of ggml by its number; of those that are not in `BLOCK_TYPES` or plain numbers only sizes are known."""
