"""Formats of a KV cache: what configurations say of them, and scales of magnitudes."""

from __future__ import annotations

import pytest
import torch

from hawqtool.formats.cache import CACHE_FORMATS, LARGEST, CachedAttention, cache_scale, cache_scheme, scheme_format


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_schemes_name_their_format(name: str) -> None:
    scheme = cache_scheme(name)
    assert scheme_format(scheme | {"group_size": None}) == name
    for wrong in (scheme | {"num_bits": 4}, scheme | {"dynamic": True}, {"type": "float"}, 8):
        with pytest.raises(ValueError, match="strategy tensor or attn_head"):
            scheme_format(wrong)


def test_parts_are_a_scale_each_or_one_a_head() -> None:
    attention = CachedAttention("model.layers.3.self_attn", "layers.3.self_attn", heads=3, head_width=64)
    assert attention.cached_values == 2 * 3 * 64
    assert {part.shape for part in attention.parts("fp8")} == {(1,)}
    assert {part.shape for part in attention.parts("fp8-head")} == {(3, 1, 1)}


@pytest.mark.parametrize("peak", [1e-30, 0.013, 1.0, 112.0, 224.0, 224.1, 9e4])
def test_a_scale_leaves_twice_the_peak_and_is_a_power_of_two(peak: float) -> None:
    scale = cache_scale(peak)
    assert 2 * peak <= LARGEST * scale < 4.001 * peak and torch.frexp(torch.tensor(scale))[0] == 0.5
    assert cache_scale(0.0) == 1.0
