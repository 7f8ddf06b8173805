"""Stored scales of a KV cache: reading and checking them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.formats.cache import CACHE_FORMATS, KEY_SCALE, SCALE_DTYPES, VALUE_SCALE, CachedAttention, scheme_format

_SUFFIXES = (KEY_SCALE, VALUE_SCALE)


def cache_names(index: CheckpointIndex) -> tuple[str, ...]:
    """Names of the stored scales, in file order."""
    return tuple(name for name in index.tensors if name.endswith(_SUFFIXES))


def cache_scales(index: CheckpointIndex) -> dict[str, Tensor]:
    """Stored scales by the names of their tensors."""
    reader = TensorReader(index)
    return {name: reader.tensor(name) for name in cache_names(index)}


def cache_record(attentions: tuple[CachedAttention, ...], cache_format: str) -> dict[str, Any]:
    """What ``reproduce/plan.json`` says of a cache: its format, and the heads of every attention."""
    return {"format": cache_format, "heads": {attention.name: attention.heads for attention in attentions}}


def is_cache_record(content: Any) -> bool:
    """Whether a content has the form of `cache_record`, or is None."""
    if content is None:
        return True
    heads = content.get("heads") if isinstance(content, dict) else None
    if not isinstance(heads, dict) or not all(type(count) is int and count > 0 for count in heads.values()):
        return False
    return content.get("format") in CACHE_FORMATS


def cache_problems(config: Mapping[str, Any], reader: TensorReader, record: Mapping[str, Any] | None) -> list[str]:
    """Scales of a KV cache that are missing, unknown, of another shape, or no positive numbers.

    Args:
        config: The ``quantization_config``.
        reader: The packed folder.
        record: What the plan says of the cache; None where it says nothing of one.
    """
    stored, scheme = cache_names(reader.index), config.get("kv_cache_scheme")
    wanted = None if record is None else record["format"]
    try:
        found = None if scheme is None else scheme_format(scheme)
    except ValueError as error:
        return [f"{error}; write it again"]
    if found != wanted:
        return [
            f"kv_cache_scheme of config.json is that of {found or 'no cache'}, reproduce/plan.json says "
            f"{wanted or 'none'}; engines would cache in another format than was judged; write it again"
        ]
    if record is None:
        return []  # scales of the original that no engine looks at may be there
    heads = record["heads"]
    expected = {
        name + part.suffix: part.shape
        for name, count in heads.items()
        for part in CachedAttention(name, name, count, 1).parts(str(wanted))
    }
    problems = [
        f"{name} scales a KV cache that the plan does not know; remove it" for name in stored if name not in expected
    ]
    for name, shape in expected.items():
        info = reader.index.tensors.get(name)
        if info is None:
            problems.append(f"{name} is missing: engines take 1 in its place; write it again")
        elif info.dtype not in SCALE_DTYPES or tuple(info.shape) != shape:
            known = f"{' or '.join(SCALE_DTYPES)} {list(shape)}"
            problems.append(f"{name} is {info.dtype} {list(info.shape)}; expected {known}; write it again")
        elif not bool(((scales := reader.tensor(name)) > 0).all() and torch.isfinite(scales).all()):
            problems.append(f"{name} holds {float(scales.min())}; expected positive finite numbers; write it again")
    return problems
