"""Packing of blocks: codes, integer scales and fp16 scales to the bytes of llama.cpp, and back.

Layouts are those of ggml's block structures (ggml-common.h), which `BlockType` lists; all work is on whole tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_layouts import LAYOUTS
from hawqtool.checkpoint.gguf.block_types import BlockType


class BlockFields(NamedTuple):
    """What the blocks of a ``[out, in]`` weight hold, before packing.

    Args:
        codes: ``[out, in]`` int8, from `BlockType.min_code` to `BlockType.max_code`.
        scale: ``[out, blocks]`` float16, d; it may be negative.
        minimum: ``[out, blocks]`` float16: m of Q4_1 and Q5_1, which is added, or dmin of K types, of which multiples
            are subtracted; None on symmetric grids.
        scales: ``[out, groups]`` int8, integer scales of the sub-blocks; None where a block has one scale.
        minima: ``[out, groups]`` int8, integer minima of the sub-blocks; None where there are none.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None


class BlockGrid(NamedTuple):
    """The grid that stored scales give: w = step * value(code) + offset.

    Args:
        steps: ``[out, groups]`` float32.
        offsets: ``[out, groups]`` float32; None on symmetric grids.
    """

    steps: Tensor
    offsets: Tensor | None


def pack_blocks(fields: BlockFields, kind: BlockType) -> Tensor:
    """Bytes of a weight as a GGUF file has them, ``[out, bytes of a row]`` uint8.

    Raises:
        ValueError: If rows are no whole blocks.
    """
    rows, columns = fields.codes.shape
    if not kind.divides(columns):
        raise ValueError(f"rows of {columns} weights are no whole blocks of {kind.name} ({kind.block_size})")
    parts = {
        "codes": fields.codes.reshape(-1, kind.block_size).to(torch.int32),
        "d": _fp16_bytes(fields.scale),
    }
    if fields.minimum is not None:
        parts["m"] = _fp16_bytes(fields.minimum)
    per_block = kind.block_size // kind.group_size
    if fields.scales is not None:
        parts["scales"] = fields.scales.reshape(-1, per_block).to(torch.int32)
    if fields.minima is not None:
        parts["minima"] = fields.minima.reshape(-1, per_block).to(torch.int32)
    return LAYOUTS[kind.name].pack(parts).view(rows, -1)


def unpack_blocks(stored: Tensor, kind: BlockType) -> BlockFields:
    """Inverse of `pack_blocks`.

    Args:
        stored: ``[out, bytes of a row]`` uint8.
        kind: Its type.
    """
    rows = len(stored)
    parts = LAYOUTS[kind.name].unpack(stored.reshape(-1, kind.block_bytes))

    def small(name: str) -> Tensor | None:
        return parts[name].to(torch.int8).view(rows, -1) if name in parts else None

    codes, scale = small("codes"), _fp16(parts["d"], rows)
    assert codes is not None
    minimum = _fp16(parts["m"], rows) if "m" in parts else None
    return BlockFields(codes, scale, minimum, small("scales"), small("minima"))


def block_grid(fields: BlockFields, kind: BlockType) -> BlockGrid:
    """Steps and offsets as llama.cpp computes them from stored scales, products in float32."""
    per_block = kind.block_size // kind.group_size
    steps, offsets = _by_group(fields.scale, per_block), None
    if fields.scales is not None:
        steps = steps * fields.scales.float()
    if fields.minimum is not None:
        offsets = _by_group(fields.minimum, per_block)
        offsets = offsets if fields.minima is None else -(offsets * fields.minima.float())
    return BlockGrid(steps, offsets)


def code_values(codes: Tensor, kind: BlockType) -> Tensor:
    """Values of codes in units of the step, float32."""
    if kind.values is None:
        return codes.float()
    table = torch.tensor(kind.values, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view_as(codes)


def grid_values(codes: Tensor, grid: BlockGrid, kind: BlockType) -> Tensor:
    """Weights of codes on a grid, ``[out, in]`` float32: llama.cpp's products and sums, in its order."""
    rows, columns = codes.shape
    values = code_values(codes, kind).view(rows, -1, kind.group_size) * grid.steps.unsqueeze(-1)
    if grid.offsets is not None:
        values = values + grid.offsets.unsqueeze(-1)
    return values.view(rows, columns)


def dequantize_blocks(stored: Tensor, kind: BlockType) -> Tensor:
    """Weights of stored blocks as llama.cpp dequantizes them, ``[out, in]`` float32.

    Args:
        stored: ``[out, bytes of a row]`` uint8.
        kind: Its type.
    """
    fields = unpack_blocks(stored, kind)
    return grid_values(fields.codes, block_grid(fields, kind), kind)


def _by_group(values: Tensor, per_block: int) -> Tensor:
    return values.float().repeat_interleave(per_block, dim=1)


def _fp16_bytes(values: Tensor) -> Tensor:
    """``[blocks, 2]`` uint8, little-endian as are all machines that torch runs on."""
    return values.to(torch.float16).contiguous().view(torch.uint8).view(-1, 2)


def _fp16(stored: Tensor, rows: int) -> Tensor:
    return stored.contiguous().view(torch.float16).view(rows, -1)
