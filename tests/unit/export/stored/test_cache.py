"""Checks of the stored scales of a KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.export.stored.cache import cache_problems, cache_record, cache_scales, is_cache_record
from hawqtool.formats.cache import CachedAttention, cache_scheme

ATTENTION = CachedAttention("a.0.self_attn", "a.0.self_attn", heads=2, head_width=8)
KEY, VALUE = "a.0.self_attn.k_scale", "a.0.self_attn.v_scale"


def problems(folder: Path, kind: str, scheme: Any, scales: dict[str, Tensor]) -> list[str]:
    save_file({name: tensor.clone() for name, tensor in scales.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    record = cache_record((ATTENTION,), kind) if kind else None
    assert is_cache_record(record)
    return cache_problems({"kv_cache_scheme": scheme}, TensorReader(read_index(folder)), record)


def test_what_engines_would_take_wrongly_is_found(tmp_path: Path) -> None:
    one, heads = torch.tensor([0.5]), torch.tensor([0.5, 0.25]).view(2, 1, 1)
    good = {KEY: one, VALUE: one.clone()}
    assert problems(tmp_path, "fp8", cache_scheme("fp8"), good) == []
    assert cache_scales(read_index(tmp_path)).keys() == good.keys()
    assert problems(tmp_path, "fp8-head", cache_scheme("fp8-head"), {KEY: heads, VALUE: heads.clone()}) == []
    wrong = {
        "a.0.self_attn.v_scale is missing": ("fp8", "fp8", {KEY: one}),
        "expected F32 or BF16 [1]": ("fp8", "fp8", {KEY: heads, VALUE: one}),
        "expected F32 or BF16 [2, 1, 1]": ("fp8-head", "fp8-head", good | {VALUE: heads}),
        "holds 0.0": ("fp8", "fp8", good | {VALUE: 0 * one}),
        "holds nan": ("fp8", "fp8", good | {VALUE: torch.nan * one}),
        "the plan does not know": ("fp8", "fp8", good | {"a.1.self_attn.k_scale": one}),
        "is that of no cache": ("fp8", None, good),
        "is that of fp8-head": ("fp8", "fp8-head", good),
        "says none": ("", "fp8", {"a": one}),
    }
    for text, (kind, scheme, scales) in wrong.items():
        found = problems(tmp_path, kind, scheme and cache_scheme(scheme), scales)
        assert len(found) == 1 and text in found[0], (text, found)
    assert "none that is written here" in problems(tmp_path, "fp8", {"num_bits": 8}, good)[0]


@pytest.mark.parametrize("content", [{}, {"format": "fp8"}, {"format": "int8", "heads": {}}, {"heads": {"a": 0}}, 3])
def test_records_of_another_form(content: Any) -> None:
    assert not is_cache_record(content)


def test_scales_of_an_original_without_such_a_cache_are_left_alone(tmp_path: Path) -> None:
    assert problems(tmp_path, "", None, {KEY: torch.ones(1)}) == []
