"""The order of bits in the blocks of GGUF, layout by layout, as ggml's dequantization reads them.

A layout packs ``[blocks, n]`` int32 parts by name (codes, scales, minima) and ``[blocks, 2]`` bytes of fp16 numbers
(d, m) to ``[blocks, bytes]`` uint8, and takes them apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Both directions of a block's layout."""

    pack: Callable[[Parts], Tensor]
    unpack: Callable[[Tensor], dict[str, Tensor]]


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat([part.to(torch.uint8) for part in parts], 1)


def _cut(stored: Tensor, *widths: int) -> list[Tensor]:
    """Parts of the bytes, as int32."""
    return list(stored.to(torch.int32).split(widths, 1))


def _bits_of(values: Tensor, shifts: range) -> Tensor:
    """``[blocks, n, len(shifts), m]`` of ``[blocks, n, m]``: each value shifted right."""
    steps = torch.tensor(shifts, dtype=torch.int32, device=values.device)
    return values.unsqueeze(2) >> steps.view(1, 1, -1, 1)


def _stacked(values: Tensor, shifts: range) -> Tensor:
    """``[blocks, n, m]`` of ``[blocks, n, len(shifts), m]``: small numbers put above each other into a byte."""
    steps = torch.tensor(shifts, dtype=torch.int32, device=values.device)
    return (values << steps.view(1, 1, -1, 1)).sum(2, dtype=torch.int32)


_NIBBLES, _PAIRS, _SINGLE = range(0, 8, 4), range(0, 8, 2), range(8)


def _pack_nibbles(codes: Tensor, width: int) -> Tensor:
    """Codes of 4 bits: byte j of each run of 2 ``width`` codes has code j low and code j + width high."""
    return _stacked((codes & 15).view(len(codes), -1, 2, width), _NIBBLES).flatten(1)


def _unpack_nibbles(stored: Tensor, width: int) -> Tensor:
    return (_bits_of(stored.reshape(len(stored), -1, width), _NIBBLES) & 15).flatten(1)


def _pack_pairs(codes: Tensor) -> Tensor:
    """Codes of 2 bits: byte l of each half of 128 has codes l, l + 32, l + 64, l + 96."""
    return _stacked((codes & 3).view(-1, 2, 4, 32), _PAIRS).flatten(1)


def _unpack_pairs(stored: Tensor) -> Tensor:
    return (_bits_of(stored.reshape(-1, 2, 32), _PAIRS) & 3).flatten(1)


def _pack_mask(bits: Tensor) -> Tensor:
    """One bit of each of 256 codes: bit k of byte l is that of code 32 k + l."""
    return _stacked(bits.view(-1, 1, 8, 32), _SINGLE).flatten(1)


def _unpack_mask(stored: Tensor) -> Tensor:
    return (_bits_of(stored.reshape(-1, 1, 32), _SINGLE) & 1).flatten(1)


def _pack_word(bits: Tensor) -> Tensor:
    """One bit of each of 32 codes: a little-endian word."""
    return _stacked(bits.view(-1, 4, 8, 1), _SINGLE).flatten(1)


def _unpack_word(stored: Tensor) -> Tensor:
    return (_bits_of(stored.reshape(-1, 4, 1), _SINGLE) & 1).flatten(1)


def _small_blocks(bits: int, zero: int, has_minimum: bool) -> Layout:
    """Blocks of 32 codes of 4 or 5 bits behind one or two fp16 numbers; ``zero`` is added to codes."""
    heads = ("d", "m") if has_minimum else ("d",)

    def pack(parts: Parts) -> Tensor:
        codes = parts["codes"] + zero
        high = (_pack_word(codes >> 4),) if bits == 5 else ()
        return _joined(*(parts[name] for name in heads), *high, _pack_nibbles(codes, 16))

    def unpack(stored: Tensor) -> dict[str, Tensor]:
        at = 2 * len(heads)
        found = {name: stored[:, 2 * i : 2 * i + 2] for i, name in enumerate(heads)}
        high, low = _cut(stored[:, at:], 4 * (bits == 5), 16)
        codes = _unpack_nibbles(low, 16)
        return found | {"codes": (codes | _unpack_word(high) << 4 if bits == 5 else codes) - zero}

    return Layout(pack, unpack)


def _pack_q8_0(parts: Parts) -> Tensor:
    return _joined(parts["d"], parts["codes"] & 255)


def _unpack_q8_0(stored: Tensor) -> dict[str, Tensor]:
    return {"d": stored[:, :2], "codes": stored[:, 2:].contiguous().view(torch.int8)}


def _pack_q2_k(parts: Parts) -> Tensor:
    return _joined(parts["scales"] | parts["minima"] << 4, _pack_pairs(parts["codes"]), parts["d"], parts["m"])


def _unpack_q2_k(stored: Tensor) -> dict[str, Tensor]:
    both, codes = _cut(stored[:, :80], 16, 64)
    found = {"scales": both & 15, "minima": both >> 4, "codes": _unpack_pairs(codes)}
    return found | {"d": stored[:, 80:82], "m": stored[:, 82:]}


def _pack_q3_k(parts: Parts) -> Tensor:
    codes, scales = parts["codes"] + 4, parts["scales"] + 32
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = _stacked((scales >> 4).view(-1, 1, 4, 4), _PAIRS).flatten(1)
    return _joined(_pack_mask(codes >> 2), _pack_pairs(codes), low, high, parts["d"])


def _unpack_q3_k(stored: Tensor) -> dict[str, Tensor]:
    mask, codes, low, high = _cut(stored[:, :108], 32, 64, 8, 4)
    tops = (_bits_of(high.reshape(-1, 1, 4), _PAIRS) & 3).flatten(1)
    scales = torch.cat([low & 15, low >> 4], 1) | tops << 4
    levels = _unpack_pairs(codes) | _unpack_mask(mask) << 2
    return {"codes": levels - 4, "scales": scales - 32, "d": stored[:, 108:]}


def _pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in twelve bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return _joined(first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4)


def _unpack_six_bits(stored: Tensor) -> tuple[Tensor, Tensor]:
    first, second, rest = _cut(stored, 4, 4, 4)
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], 1)
    return scales, torch.cat([second & 63, rest >> 4 | second >> 6 << 4], 1)


def _pack_q4_k(parts: Parts) -> Tensor:
    six = _pack_six_bits(parts["scales"], parts["minima"])
    return _joined(parts["d"], parts["m"], six, _pack_nibbles(parts["codes"], 32))


def _unpack_q4_k(stored: Tensor) -> dict[str, Tensor]:
    scales, minima = _unpack_six_bits(stored[:, 4:16])
    codes = _unpack_nibbles(stored[:, 16:].to(torch.int32), 32)
    return {"d": stored[:, :2], "m": stored[:, 2:4], "scales": scales, "minima": minima, "codes": codes}


def _pack_q5_k(parts: Parts) -> Tensor:
    codes = parts["codes"]
    six = _pack_six_bits(parts["scales"], parts["minima"])
    return _joined(parts["d"], parts["m"], six, _pack_mask(codes >> 4), _pack_nibbles(codes, 32))


def _unpack_q5_k(stored: Tensor) -> dict[str, Tensor]:
    scales, minima = _unpack_six_bits(stored[:, 4:16])
    mask, low = _cut(stored[:, 16:], 32, 128)
    codes = _unpack_nibbles(low, 32) | _unpack_mask(mask) << 4
    return {"d": stored[:, :2], "m": stored[:, 2:4], "scales": scales, "minima": minima, "codes": codes}


def _pack_q6_k(parts: Parts) -> Tensor:
    # Quarters of each half of 128 codes: low nibbles of the first and third, of the second and fourth share bytes.
    quarters = (parts["codes"] + 32).view(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4).flatten(1)
    high = _stacked(quarters >> 4, _PAIRS).flatten(1)
    return _joined(low, high, parts["scales"] & 255, parts["d"])


def _unpack_q6_k(stored: Tensor) -> dict[str, Tensor]:
    low, high = _cut(stored[:, :192], 128, 64)
    nibbles = torch.cat([low.view(-1, 2, 2, 32) & 15, low.view(-1, 2, 2, 32) >> 4], 2)
    tops = _bits_of(high.view(-1, 2, 32), _PAIRS) & 3
    scales = stored[:, 192:208].contiguous().view(torch.int8)
    return {"codes": (nibbles | tops << 4).flatten(1) - 32, "scales": scales, "d": stored[:, 208:]}


def _pack_iq4_xs(parts: Parts) -> Tensor:
    scales = parts["scales"] + 32
    low = scales[:, ::2] & 15 | (scales[:, 1::2] & 15) << 4
    high = _stacked((scales >> 4).view(-1, 2, 4, 1), _PAIRS).flatten(1)
    return _joined(parts["d"], high, low, _pack_nibbles(parts["codes"], 16))


def _unpack_iq4_xs(stored: Tensor) -> dict[str, Tensor]:
    high, low, codes = _cut(stored[:, 2:], 2, 4, 128)
    tops = (_bits_of(high.reshape(-1, 2, 1), _PAIRS) & 3).flatten(1)
    scales = torch.stack([low & 15, low >> 4], 2).flatten(1) | tops << 4
    return {"d": stored[:, :2], "scales": scales - 32, "codes": _unpack_nibbles(codes, 16)}


LAYOUTS = {
    "Q4_0": _small_blocks(4, 8, has_minimum=False),
    "Q4_1": _small_blocks(4, 0, has_minimum=True),
    "Q5_0": _small_blocks(5, 16, has_minimum=False),
    "Q5_1": _small_blocks(5, 0, has_minimum=True),
    "Q8_0": Layout(_pack_q8_0, _unpack_q8_0),
    "Q2_K": Layout(_pack_q2_k, _unpack_q2_k),
    "Q3_K": Layout(_pack_q3_k, _unpack_q3_k),
    "Q4_K": Layout(_pack_q4_k, _unpack_q4_k),
    "Q5_K": Layout(_pack_q5_k, _unpack_q5_k),
    "Q6_K": Layout(_pack_q6_k, _unpack_q6_k),
    "IQ4_NL": _small_blocks(4, 0, has_minimum=False),
    "IQ4_XS": Layout(_pack_iq4_xs, _unpack_iq4_xs),
}
"""By the name of the type."""
