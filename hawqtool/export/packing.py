"""Dense bit packing of integer codes: the layout of compressed-tensors' ``pack-quantized`` from version 0.18 on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_LANES = 32
"""Codes per tile: 32 codes of ``bits`` bits fill exactly ``bits`` words."""

_SLICE_CODES = 1 << 24
"""Rows are packed in slices of about this many codes, because the int64 intermediate is 8 times the codes."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes into a dense little-endian bit stream per row.

    The stored code is ``q + 2^(bits-1)``; code j of a row occupies bits ``[j*bits, (j+1)*bits)``, least
    significant bit first, and may straddle two words.

    Args:
        codes: ``[out, in]`` int8 in ``[-2^(bits-1), 2^(bits-1)-1]``.
        bits: 2 to 8.

    Returns:
        ``[out, ceil(in*bits/32)]`` int32 on the same device.

    Raises:
        ValueError: If a code is out of range; it would corrupt its neighbours.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes span {int(codes.min())} to {int(codes.max())}; {bits} bits hold {low} to {high}")
    rows, columns = codes.shape
    packed = torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32, device=codes.device)
    step = _rows_per_slice(columns)
    for start in range(0, rows, step):
        packed[start : start + step] = _pack_slice(codes[start : start + step], bits)[:, : packed.shape[1]]
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`.

    Args:
        packed: ``[out, ceil(columns*bits/32)]`` int32.
        bits: 2 to 8.
        columns: Codes per row.

    Returns:
        ``[out, columns]`` int8, signed, on the same device.

    Raises:
        ValueError: If the number of words does not fit ``columns``.
    """
    words = -(-columns * bits // 32)
    if packed.shape[1] != words:
        raise ValueError(f"rows have {packed.shape[1]} words; {columns} codes of {bits} bits take {words}")
    codes = torch.empty(packed.shape[0], columns, dtype=torch.int8, device=packed.device)
    step = _rows_per_slice(columns)
    for start in range(0, packed.shape[0], step):
        codes[start : start + step] = _unpack_slice(packed[start : start + step], bits)[:, :columns]
    return codes


def _rows_per_slice(columns: int) -> int:
    return max(1, _SLICE_CODES // max(columns, 1))


def _pack_slice(codes: Tensor, bits: int) -> Tensor:
    """``[rows, in]`` int8 to ``[rows, ceil(in/32)*bits]`` int32, zero bits after the last code."""
    rows, columns = codes.shape
    unsigned = pad(codes.to(torch.int64) + (1 << (bits - 1)), (0, -columns % _LANES))
    lanes = unsigned.view(rows, -1, _LANES)
    words = torch.zeros(rows, lanes.shape[1], bits, dtype=torch.int64, device=codes.device)
    for lane in range(_LANES):
        word, shift = divmod(lane * bits, 32)
        words[:, :, word] |= lanes[:, :, lane] << shift
        if shift + bits > 32:
            words[:, :, word + 1] |= lanes[:, :, lane] >> (32 - shift)
    # Narrowing a wide value to int32 keeps the low 32 bits only where they are a valid int32: wrap explicitly.
    words &= 0xFFFFFFFF
    words -= (words >> 31) << 32
    return words.to(torch.int32).view(rows, -1)


def _unpack_slice(packed: Tensor, bits: int) -> Tensor:
    """``[rows, words]`` int32 to ``[rows, 32*ceil(words/bits)]`` int8."""
    rows, words_in = packed.shape
    words = pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, -words_in % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, words.shape[1], _LANES, dtype=torch.int8, device=packed.device)
    for lane in range(_LANES):
        word, shift = divmod(lane * bits, 32)
        value = words[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (words[:, :, word + 1] << (32 - shift))
        codes[:, :, lane] = ((value & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.int8)
    return codes.view(rows, -1)
