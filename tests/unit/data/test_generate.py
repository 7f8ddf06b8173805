"""Sampling with a cache of fixed size: the tokens are those that whole passes give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.data import generate
from hawqtool.data.generate import draw_tokens, grouped_attention, static_cache_rows, takes_static_cache
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind


def test_a_cache_of_fixed_size_gives_the_tokens_of_whole_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m"), dtype=torch.float32).eval()
    start, told = torch.tensor([[1], [5], [9]]), list[int]()
    monkeypatch.setattr(generate, "draw_tokens", lambda p: p.argmax(-1, keepdim=True))  # nothing left to chance
    calls = list[int]()

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return grouped_attention(*args, **kwargs)

    monkeypatch.setattr(generate, "grouped_attention", attention)
    with torch.no_grad():
        rows = static_cache_rows(model, start, 12, told.append)
        expected: Tensor = start
        while expected.shape[1] < 12:
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(rows, expected) and told == list(range(2, 13))
    assert len(calls) == 11 * model.config.num_hidden_layers
    assert takes_static_cache(model, 12)


def test_heads_of_a_group_attend_as_with_copies_of_their_keys() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 1, 16), torch.randn(3, 2, 5, 16), torch.randn(3, 2, 5, 16)
    mask = torch.zeros(3, 1, 1, 5)
    mask[..., 3:] = torch.finfo(torch.float32).min
    found, _ = grouped_attention(None, query, key, value, mask, scaling=0.3)
    copies = [part.repeat_interleave(4, 1)[:, :, :3] for part in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *copies, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_models_whose_steps_differ_are_left_to_transformers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_kind(kind_named("mixtral"), tmp_path))
    assert not takes_static_cache(model, 12)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    counts = torch.bincount(draw_tokens(probabilities.expand(20_000, 4)).flatten(), minlength=4) / 20_000
    torch.testing.assert_close(counts, probabilities, atol=0.02, rtol=0)
