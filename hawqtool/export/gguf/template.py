"""Which tensors of a template are which of a checkpoint's: found by what their rows hold, not by names.

llama.cpp's converter renames tensors, stacks experts, and for some architectures reorders the rows of query and key
projections. Rows themselves stay as they are, and so a matrix is recognised by them in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import dequantize_blocks
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType
from hawqtool.checkpoint.gguf.header import GgufHeader, GgufTensor
from hawqtool.errors import InputLostError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are numbers as torch has them."""

_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Piece:
    """A matrix of the checkpoint that is a tensor of the template, or one of its experts.

    Args:
        source: Name of the checkpoint's matrix.
        rows: ``[out]`` int64: row r of the template is row ``rows[r]`` of the source; None where they are in order.
    """

    source: str
    rows: Tensor | None = None


@dataclass(frozen=True)
class Match:
    """A tensor of the template with the matrices that it holds.

    Args:
        tensor: The template's.
        pieces: One, or one for each expert, in the template's order.
    """

    tensor: GgufTensor
    pieces: tuple[Piece, ...]


def match_template(
    header: GgufHeader, sources: Mapping[str, tuple[int, int]], read: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, Match]:
    """Matrices of a checkpoint by the name of the template's tensor that holds them.

    A match is accepted where every row is equal to the bit, in the type of the template, or in ``dtype`` where the
    template is quantized. Tensors without a match, of other numbers of dimensions, or of types that are not read are
    left out.

    Args:
        header: Header of the template.
        sources: Shapes ``(out, in)`` of the checkpoint's matrices by name.
        read: Gives one of them, ``[out, in]``.
        dtype: Of the checkpoint's weights.
    """
    wanted = [t for t in header.tensors.values() if len(t.shape) in (2, 3) and (t.kind.name in PLAIN or _is_block(t))]
    shapes = {(tensor.shape[-2], tensor.shape[-1]) for tensor in wanted}
    dtypes = {PLAIN.get(tensor.kind.name, dtype) for tensor in wanted}
    places: dict[tuple[torch.dtype, tuple[int, int], int], list[str]] = {}
    for name, shape in sources.items():
        if shape in shapes:
            weight = read(name)
            for kind in dtypes:
                places.setdefault((kind, shape, _sum(row_hashes(weight.to(kind)))), []).append(name)
    found: dict[str, Match] = {}
    for tensor in wanted:
        kind = PLAIN.get(tensor.kind.name, dtype)
        values = read_tensor(header, tensor).to(kind)
        pieces = [_piece(matrix, places, read) for matrix in values.view(-1, *values.shape[-2:])]
        whole = [piece for piece in pieces if piece is not None]
        if len(whole) == len(pieces):
            found[tensor.name] = Match(tensor, tuple(whole))
    return found


def _is_block(tensor: GgufTensor) -> bool:
    return isinstance(tensor.kind, BlockType)


def _piece(
    matrix: Tensor,
    places: Mapping[tuple[torch.dtype, tuple[int, int], int], Iterable[str]],
    read: Callable[[str], Tensor],
) -> Piece | None:
    """The first source that has the rows of a matrix of the template."""
    hashes = row_hashes(matrix)
    for name in places.get((matrix.dtype, (matrix.shape[0], matrix.shape[1]), _sum(hashes)), ()):
        source = read(name).to(matrix.dtype)
        if torch.equal(source, matrix):
            return Piece(name)
        order = torch.empty_like(hashes)
        # Equal rows have equal numbers, so that both sorts bring them to the same places.
        order[hashes.argsort(stable=True)] = row_hashes(source).argsort(stable=True)
        if torch.equal(source[order], matrix):
            return Piece(name, order)
    return None


def row_hashes(matrix: Tensor) -> Tensor:
    """A number of 64 bits for the bytes of each row, ``[rows]`` int64: equal for equal rows, else hardly ever.

    Args:
        matrix: ``[rows, columns]`` float32, float16 or bfloat16.
    """
    words = matrix.contiguous().view(torch.int16)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator, dtype=torch.int64)
    step = max(1, _CHUNK_ELEMENTS // max(words.shape[1], 1))
    found = [(part.to(torch.int64) * factors).sum(1) for part in words.split(step)]
    mixed = torch.cat(found)
    mixed ^= mixed >> 29  # sums of rows of a matrix shall not be those of other rows' sums
    return mixed * 0x2545F4914F6CDD1D


def _sum(hashes: Tensor) -> int:
    """The same number for the same rows in any order."""
    return int(hashes.sum())


def read_tensor(header: GgufHeader, tensor: GgufTensor) -> Tensor:
    """Values of a tensor as torch has them: its own type, or float32 of blocks.

    Raises:
        InputLostError: If the file cannot be read.
    """
    stored = torch.frombuffer(bytearray(read_bytes(header, tensor)), dtype=torch.uint8)
    if isinstance(tensor.kind, BlockType):
        rows = math.prod(tensor.shape[:-1])
        return dequantize_blocks(stored.view(rows, -1), BLOCK_TYPES[tensor.kind.name]).view(tensor.shape)
    return stored.view(PLAIN[tensor.kind.name]).view(tensor.shape)


def read_bytes(header: GgufHeader, tensor: GgufTensor) -> bytes:
    """Stored bytes of a tensor.

    Raises:
        InputLostError: If the file cannot be read.
    """
    try:
        with header.path.open("rb") as stream:
            stream.seek(tensor.start)
            data = stream.read(tensor.num_bytes)
    except OSError as error:
        raise InputLostError(f"{header.path} cannot be read ({error.strerror}); check the disk") from None
    if len(data) != tensor.num_bytes:
        raise InputLostError(f"{header.path} ended inside tensor {tensor.name}; download or convert it again")
    return data
