"""A walk with a rounded KV cache against attention written out in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.formats.cache import KEY_SCALE, VALUE_SCALE
from hawqtool.pipeline.run.job import prepare
from hawqtool.streaming.rounded_cache import CacheRounding, cached_attentions
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind


def rounded(states: Tensor, scale: Tensor) -> Tensor:
    return (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale


def test_attention_sees_rounded_keys_values_and_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.float32)
    job = prepare(RunConfig(model=str(folder), device="cpu"), writes=False)
    attentions = cached_attentions(job.structure, job.skeleton)
    scales = {
        attention.name + suffix: torch.tensor([2.0**-7, 2.0**-3]).view(2, 1, 1) * (1 + number)
        for number, attention in enumerate(attentions)
        for suffix in (KEY_SCALE, VALUE_SCALE)
    }
    tokens = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    stream = job.stream()
    stream.cache = CacheRounding(attentions, scales)
    with torch.no_grad():
        own = stream.outputs(tokens, stream.final_hidden(tokens, 2, lambda _: None))

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        name = f"model.layers.{module.layer_idx}.self_attn"
        key, value = rounded(key, scales[name + KEY_SCALE]), rounded(value, scales[name + VALUE_SCALE])
        query = rounded(query, torch.ones(1)).unflatten(1, (2, 2))
        products = torch.einsum("bhgqd,bhkd->bhgqk", query, key) / 4.0
        products += torch.full(products.shape[-2:], -torch.inf).triu(1)
        found = torch.einsum("bhgqk,bhkd->bqhgd", products.softmax(-1), value)
        return found.flatten(2, 3), None

    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        expected = model(tokens).logits
        other = nn.functional.log_softmax(own.view_as(expected).double(), -1)
    # Some states lie so near to the middle of two codes that float32 falls to the other one.
    difference = (other - expected.log_softmax(-1)).abs()
    assert float(difference.quantile(0.9)) < 2e-4 and float(difference.max()) < 0.05


@pytest.mark.parametrize(
    ("name", "message"), [("bert", "no decoder"), ("gpt2", "no attention of"), ("llama", "shared, latent")]
)
def test_models_without_such_a_cache_are_refused(name: str, message: str, tmp_path: Path) -> None:
    model = str(save_kind(kind_named(name), tmp_path))
    job = prepare(RunConfig(model=model, device="cpu", kv_cache="fp8"), writes=False)
    if name == "llama":  # as Gemma 3n has it
        job.skeleton.get_submodule("model.layers.1.self_attn").is_kv_shared_layer = True
    with pytest.raises(UsageError, match=message):
        _ = job.caches
