"""Packing of codes as compressed-tensors 0.18 has it: dense bit streams of integers, pairs of 4-bit floats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1, by index."""

_TILE = 32
"""Rows are padded to a multiple of this: 32 codes of ``bits`` bits fill exactly ``bits`` words."""

_SLICE_CODES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Rows are handled in slices of about this many codes: intermediates are wider, and on a CPU should stay cached."""


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
    step = _batch_size(columns, codes.device)
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
    step = _batch_size(columns, packed.device)
    for start in range(0, packed.shape[0], step):
        codes[start : start + step] = _unpack_slice(packed[start : start + step], bits)[:, :columns]
    return codes


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Pack zero points along the rows: each group's column is a bit stream as `pack_codes` makes it of a row.

    Args:
        zeros: ``[out, groups]`` int8 in the range of the codes.
        bits: 2 to 8.

    Returns:
        ``[ceil(out*bits/32), groups]`` int32 on the same device.

    Raises:
        ValueError: If a zero point is out of range.
    """
    return pack_codes(zeros.t(), bits).t().contiguous()


def unpack_zeros(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of `pack_zeros`: ``[rows, groups]`` int8.

    Raises:
        ValueError: If the number of words does not fit ``rows``.
    """
    return unpack_codes(packed.t(), bits, rows).t().contiguous()


def _batch_size(columns: int, device: torch.device) -> int:
    return max(1, _SLICE_CODES.get(device.type, 1 << 24) // max(columns, 1))


def _pack_slice(codes: Tensor, bits: int) -> Tensor:
    """``[rows, in]`` int8 to ``[rows, words]`` int32 with at least the words needed, zero bits after the last code."""
    rows, columns = codes.shape
    # Views of bytes below need unit strides, which a transposed view would keep from having.
    stream = pad(codes.contiguous().to(torch.int32) + (1 << (bits - 1)), (0, -columns % _TILE))
    # Eight codes of b bits are b whole bytes: join neighbours three times, then keep b bytes of each int64.
    stream = stream[:, 0::2] | (stream[:, 1::2] << bits)
    stream = stream[:, 0::2] | (stream[:, 1::2] << (2 * bits))
    wide = stream.to(torch.int64) & 0xFFFFFFFF
    wide = wide[:, 0::2] | (wide[:, 1::2] << (4 * bits))
    kept = wide.view(torch.uint8).view(rows, -1, 8)[:, :, :bits]
    return kept.reshape(rows, -1).view(torch.int32)


def _unpack_slice(packed: Tensor, bits: int) -> Tensor:
    """``[rows, words]`` int32 to ``[rows, n]`` int8 with at least the codes that were packed."""
    rows = packed.shape[0]
    stream = packed.contiguous().view(torch.uint8)
    stream = pad(stream, (0, -stream.shape[1] % bits)).view(rows, -1, bits)
    wide = pad(stream, (0, 8 - bits)).view(torch.int64)
    mask = (1 << 4 * bits) - 1
    halves = torch.cat([wide & mask, (wide >> (4 * bits)) & mask], dim=-1)
    # Four codes of up to 8 bits fill an int32 exactly; the mask below drops what the sign bit drags in.
    quads = halves.to(torch.int32) if bits < 8 else halves.view(torch.int32)[:, :, 0::2]
    codes = torch.empty(*quads.shape, 4, dtype=torch.int8, device=packed.device)
    for lane in range(4):
        codes[..., lane] = ((quads >> (lane * bits)) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.view(rows, -1)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Pack E2M1 values two to a byte: code 2j of a row in the low half of byte j, code 2j+1 in the high half.

    A code is ``sign << 3 | index`` with the index in 0, 0.5, 1, 1.5, 2, 3, 4, 6.

    Args:
        codes: ``[out, in]`` float8_e4m3fn, E2M1 values; an even number of columns.

    Returns:
        ``[out, in / 2]`` uint8 on the same device.
    """
    values = codes.float()
    table = torch.tensor(E2M1_VALUES, device=codes.device)
    nibbles = torch.searchsorted(table, values.abs()).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of `pack_e2m1`: ``[out, in]`` float8_e4m3fn."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=packed.device)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return table.to(torch.float8_e4m3fn).view(torch.uint8)[nibbles.int()].view(torch.float8_e4m3fn)
