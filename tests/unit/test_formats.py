"""Stored bytes, labels and group sizes, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from hawqtool.formats import CHANNEL, QuantFormat, fitting_group_size, parse_label
from hawqtool.records import BitPlan, LinearSpec, Unit


@pytest.mark.parametrize(
    ("bits", "group_size", "out_features", "in_features", "scale_bytes", "expected"),
    [
        # 128 columns of 4 bits are 16 words of 4 bytes, and one 2-byte scale: 66 bytes a row.
        (4, 128, 10, 128, 2, 660),
        # 3 bits: 64 * 3 = 192 bits = 6 words, 24 bytes; two scales of group 32.
        (3, 32, 5, 64, 2, 5 * (24 + 4)),
        # 3 bits over 32 columns: 96 bits = 3 words exactly.
        (3, 32, 1, 32, 2, 12 + 2),
        # 100 columns of 3 bits: 300 bits, 9.375 words, 10 words are stored.
        (3, CHANNEL, 7, 100, 2, 7 * (40 + 2)),
        # 33 columns of 5 bits: 165 bits, 6 words.
        (5, CHANNEL, 2, 33, 2, 2 * (24 + 2)),
        # One column still takes a whole word.
        (2, CHANNEL, 3, 1, 2, 3 * (4 + 2)),
        # fp32 sources have 4-byte scales: 256 bytes of codes and 2 scales.
        (8, 128, 4, 256, 4, 4 * (256 + 8)),
        # 7 bits over 64: 448 bits = 14 words.
        (7, 64, 1, 64, 2, 56 + 2),
    ],
)
def test_stored_bytes(
    bits: int, group_size: int, out_features: int, in_features: int, scale_bytes: int, expected: int
) -> None:
    assert QuantFormat(bits, group_size).stored_bytes(out_features, in_features, scale_bytes) == expected


def test_effective_bits_count_the_scales_of_nvfp4_alone() -> None:
    expected = {
        "nvfp4": 4.5,
        "nvfp4-a4": 4.5,
        "mxfp4": 4,
        "fp8-a8f": 8,
        "w8ch-a8i": 8,
        "w4g128-a8f": 4,
        "w3g32": 3,
        "16": 16,
    }
    assert {label: parse_label(label).effective_bits for label in expected} == expected


def test_records_sum_bytes_and_weights() -> None:
    members = tuple(LinearSpec(name, rows, 128, 0, "u", 2) for name, rows in (("q", 10), ("k", 4)))
    unit = Unit("u", members)
    assert unit.stored_bytes(QuantFormat(4, 128)) == 14 * 66
    assert unit.num_weights == 14 * 128
    plan = BitPlan({"u": QuantFormat(4, 128)}, 14 * 66, 14 * 128)
    assert plan.bpw == pytest.approx(4 + 16 / 128)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("group_size", "suffix"), [(32, "g32"), (64, "g64"), (128, "g128"), (CHANNEL, "ch")])
def test_labels_round_trip(bits: int, group_size: int, suffix: str) -> None:
    fmt = QuantFormat(bits, group_size)
    assert fmt.label == f"w{bits}{suffix}"
    assert parse_label(fmt.label) == fmt
    asymmetric = QuantFormat(bits, group_size, symmetric=False)
    assert asymmetric.label == f"w{bits}{suffix}a"
    assert parse_label(asymmetric.label) == asymmetric


@pytest.mark.parametrize(
    "label", ["", "w3", "3g64", "w1g32", "w9g32", "w16g32", "w4g", "w4ch ", "w4g64x", "W4g64", "w4a", "w4g64aa"]
)
def test_malformed_labels_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match="not a format label"):
        parse_label(label)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_range(bits: int) -> None:
    fmt = QuantFormat(bits, 32)
    assert (fmt.min_code, fmt.max_code) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert fmt.max_code - fmt.min_code + 1 == 2**bits


def test_groups() -> None:
    assert QuantFormat(4, 64).num_groups(256) == 4
    assert QuantFormat(4, CHANNEL).num_groups(100) == 1
    assert QuantFormat(4, CHANNEL).group_width(100) == 100
    assert QuantFormat(4, 64).divides(192) and not QuantFormat(4, 128).divides(192)
    assert QuantFormat(4, CHANNEL).divides(7)


@pytest.mark.parametrize(
    ("requested", "in_features", "expected"),
    [(128, 256, 128), (128, 192, 64), (128, 96, 32), (64, 256, 64), (128, 100, None), (32, 48, None), (0, 7, 0)]
    + [(96, 288, 96), (96, 128, 64), (16, 48, 16), (16, 40, None), (192, 256, 128)],
)
def test_fitting_group_size(requested: int, in_features: int, expected: int | None) -> None:
    assert fitting_group_size(requested, in_features) == expected
