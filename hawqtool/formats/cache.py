"""Formats of a KV cache: how an engine rounds the keys and values that it keeps, with scales from the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hawqtool.formats.grids import StoredPart

KEY_SCALE, VALUE_SCALE = ".k_scale", ".v_scale"
"""Suffixes of the scales beside an attention's name; vLLM and compressed-tensors read them there."""

KEY_LAYER, VALUE_LAYER = ".k_proj", ".v_proj"
"""Suffixes of the layers that give them."""

SCALE_DTYPES = ("F32", "BF16")
"""Safetensors dtypes of these scales, which hold powers of two alike: engines keep them in the first, transformers
computes keys and values in that of the file, which has to be the model's."""

_STRATEGIES = {"fp8": "tensor", "fp8-head": "attn_head"}

CACHE_FORMATS = tuple(_STRATEGIES)
"""Names of the formats: FP8 (E4M3) with one scale for a layer's keys and one for its values, or with one a head."""


@dataclass(frozen=True)
class CachedAttention:
    """An attention whose keys and values an engine caches.

    Args:
        name: Prefix of its tensors in the checkpoint, such as ``model.layers.0.self_attn``.
        module: Name in the model that transformers builds.
        heads: Heads of keys and values.
        head_width: Width of one.
        scale_dtype: Of `SCALE_DTYPES`.
    """

    name: str
    module: str
    heads: int
    head_width: int
    scale_dtype: str = SCALE_DTYPES[0]

    @property
    def cached_values(self) -> int:
        """Numbers that a token adds to the cache: its keys and its values."""
        return 2 * self.heads * self.head_width

    def parts(self, cache_format: str) -> tuple[StoredPart, ...]:
        """Stored scales: ``[1]``, or ``[heads, 1, 1]`` with one a head."""
        shape = (1,) if cache_format == "fp8" else (self.heads, 1, 1)
        return tuple(StoredPart(suffix, self.scale_dtype, shape) for suffix in (KEY_SCALE, VALUE_SCALE))

    def with_scales_of(self, weights: str) -> CachedAttention:
        """The same with scales in the dtype of its layers' weights, where they may have that."""
        return replace(self, scale_dtype=weights) if weights in SCALE_DTYPES else self


def cache_scheme(cache_format: str) -> dict[str, Any]:
    """``kv_cache_scheme`` of a ``quantization_config``."""
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": _STRATEGIES[cache_format],
        "dynamic": False,
    }


def scheme_format(scheme: Any) -> str:
    """Inverse of `cache_scheme`; further keys may say nothing.

    Raises:
        ValueError: If it is none of the schemes that are written.
    """
    given = {key: value for key, value in scheme.items() if value is not None} if isinstance(scheme, Mapping) else {}
    for name in CACHE_FORMATS:
        if given == cache_scheme(name):
            return name
    raise ValueError(
        "kv_cache_scheme is none that is written here; expected null, or static symmetric 8-bit floats with strategy "
        f"{' or '.join(_STRATEGIES.values())}"
    )


def cache_scale(peak: float) -> float:
    """The scale of keys or values up to a magnitude: a power of two, at least twice what that magnitude needs.

    E4M3 has the same relative step over 15 powers of two, so that room for magnitudes that no calibration saw costs
    nothing but of the smallest numbers; a power of two divides exactly in every dtype.

    Args:
        peak: Largest magnitude seen; not negative.
    """
    return 1.0 if peak == 0 else 2.0 ** max(math.ceil(math.log2(2 * peak / LARGEST)), -126)


LARGEST = 448.0
"""Largest number of E4M3, beyond which engines cut."""
