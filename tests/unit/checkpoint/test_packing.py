"""Packing against compressed-tensors' own functions, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from hawqtool.checkpoint import packing
from hawqtool.checkpoint.packing import pack_codes, unpack_codes
from hawqtool.formats import QuantFormat

BITS = range(2, 9)
COLUMNS = (1, 7, 31, 32, 33, 64, 100, 129)


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns * 10 + bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8, generator=generator)
    codes.view(-1)[:2] = torch.tensor([low, high - 1], dtype=torch.int8)[: codes.numel()]
    return codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_equals_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, QuantFormat(bits, 0).packed_columns(columns))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_slices_do_not_change_the_words(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(13, 45, bits)
    whole = pack_codes(codes, bits)
    monkeypatch.setitem(packing._SLICE_CODES, "cpu", 4 * 45)
    assert torch.equal(pack_codes(codes, bits), whole)
    assert torch.equal(unpack_codes(whole, bits, 45), codes)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_survive(bits: int) -> None:
    for value in (-(1 << (bits - 1)), -1, 0, (1 << (bits - 1)) - 1):
        codes = torch.full((2, 65), value, dtype=torch.int8)
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 65), codes)


def test_views_pack_like_their_copies() -> None:
    for rows, columns in ((40, 33), (64, 2), (32, 1)):
        codes = random_codes(rows, columns, 3).t()
        assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))


def test_one_word_by_hand() -> None:
    # Codes -2, -1, 0, 1 are stored as 0, 1, 2, 3, least significant first: 0b11100100.
    assert pack_codes(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8), 2).tolist() == [[0b11100100]]


@pytest.mark.parametrize("value", [-5, 4])
def test_refuses_codes_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match="3 bits hold -4 to 3"):
        pack_codes(torch.tensor([[0, value]], dtype=torch.int8), 3)


def test_refuses_a_wrong_number_of_words() -> None:
    with pytest.raises(ValueError, match="64 codes of 3 bits take 6"):
        unpack_codes(torch.zeros(1, 7, dtype=torch.int32), 3, 64)
