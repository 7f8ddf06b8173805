"""Packing of blocks, bit for bit against gguf's own dequantization."""

from __future__ import annotations

import pytest
import torch

from hawqtool.checkpoint.gguf.block_codec import (
    BlockFields,
    block_grid,
    dequantize_blocks,
    grid_values,
    pack_blocks,
    unpack_blocks,
)
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, STORED_TYPES, BlockType
from tests.support import llama_cpp

gguf = pytest.importorskip("gguf")
KINDS = list(BLOCK_TYPES.values())


def random_fields(kind: BlockType, seed: int = 0, rows: int = 3, blocks: int = 4) -> BlockFields:
    """Any codes and scales that the type can hold, negative fp16 scales and zeros among them."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, columns: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (rows, columns), generator=random, dtype=torch.int32).to(torch.int8)

    def halves() -> torch.Tensor:
        values = torch.randn(rows, blocks, generator=random) * 0.02
        values[0, 0] = 0
        return values.half()

    groups = blocks * kind.block_size // kind.group_size
    return BlockFields(
        integers(kind.min_code, kind.max_code, blocks * kind.block_size),
        halves(),
        halves() if kind.has_minimum else None,
        integers(*kind.scale_codes, groups) if kind.scale_codes else None,
        integers(0, kind.max_minimum, groups) if kind.max_minimum else None,
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_those_of_gguf(kind: BlockType) -> None:
    fields = random_fields(kind)
    stored = pack_blocks(fields, kind)
    assert stored.shape == (3, kind.num_bytes(fields.codes.shape[1]))
    expected = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind.name])
    ours = grid_values(fields.codes, block_grid(fields, kind), kind)
    assert torch.equal(ours.view(torch.int32) & 0x7FFFFFFF, torch.from_numpy(expected).view(torch.int32) & 0x7FFFFFFF)
    assert torch.equal(ours, torch.from_numpy(expected))
    assert torch.equal(dequantize_blocks(stored, kind), ours)
    for found, given in zip(unpack_blocks(stored, kind), fields, strict=True):
        assert (found is None and given is None) or torch.equal(found, given)


@pytest.mark.skipif(llama_cpp.library() is None, reason="xllamacpp, which brings ggml, is not installed")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_ggml_reads_the_same_numbers(kind: BlockType) -> None:
    stored = pack_blocks(random_fields(kind, seed=2), kind)
    assert torch.equal(llama_cpp.dequantized(stored, kind), dequantize_blocks(stored, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_any_bytes_are_read_and_packed_again(kind: BlockType) -> None:
    stored = torch.randint(0, 256, (2, 2 * kind.block_bytes), generator=torch.Generator().manual_seed(1)).byte()
    assert torch.equal(pack_blocks(unpack_blocks(stored, kind), kind), stored)


def test_types_have_the_sizes_of_gguf() -> None:
    known = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {n: (k.name, k.block_size, k.block_bytes) for n, k in STORED_TYPES.items()}
    assert {n: ours[n] for n in known} == known
    assert [BLOCK_TYPES[n].bits for n in ("Q2_K", "Q3_K", "Q4_K", "Q6_K")] == [2.625, 3.4375, 4.5, 6.5625]


def test_rows_of_no_whole_blocks_are_refused() -> None:
    fields = BlockFields(torch.zeros(1, 288, dtype=torch.int8), torch.zeros(1, 1).half())
    with pytest.raises(ValueError, match="288 weights are no whole blocks of Q6_K"):
        pack_blocks(fields, BLOCK_TYPES["Q6_K"])
