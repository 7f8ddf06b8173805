"""Sampling with a cache of fixed size: the tokens are those that whole passes give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from hawqtool.data import generate, static_cache
from hawqtool.data.generate import SampledModel, generate_rows, never_sampled
from hawqtool.data.static_cache import draw_tokens, grouped_attention, static_cache_rows, takes_static_cache
from hawqtool.errors import SamplingError
from tests.support.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer
from tests.support.tiny_zoo import kind_named, save_kind


def test_a_cache_of_fixed_size_gives_the_tokens_of_whole_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m"), dtype=torch.float32).eval()
    start, told = torch.tensor([[1], [5], [9]]), list[int]()
    monkeypatch.setattr(static_cache, "draw_tokens", lambda p: p.argmax(-1, keepdim=True))  # nothing left to chance
    calls = list[int]()

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return grouped_attention(*args, **kwargs)

    monkeypatch.setattr(static_cache, "grouped_attention", attention)
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


def test_tokens_that_stand_for_images_or_have_no_embedding_are_not_sampled(tmp_path: Path) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(save_kind(kind_named("qwen2-vl"), tmp_path), dtype=torch.float32)
    assert never_sampled(model, VOCAB_SIZE) == [120, 121]
    assert never_sampled(model, VOCAB_SIZE + 2) == [120, 121, 128, 129]
    text, never = (
        AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m"), dtype=torch.float32),
        list(range(100)),
    )
    assert never_sampled(text, VOCAB_SIZE) == []
    start = torch.zeros(8, 1, dtype=torch.long)
    with torch.no_grad():
        for sample in (static_cache_rows, generate._rows_by_transformers):
            rows = sample(text, start, 12, lambda _: None, never)
            assert rows.shape == (8, 12) and int(rows[:, 1:].min()) >= 100


def test_whatever_a_model_raises_while_it_is_sampled_says_how_to_do_without(tmp_path: Path) -> None:
    source = SampledModel(tiny_llama(tmp_path / "m"), tiny_tokenizer(), torch.device("cpu"), torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)

    def rows(found: Tensor | Exception) -> Tensor:
        def generated(*_: object, **__: object) -> Tensor:
            if isinstance(found, Exception):
                raise found
            return found

        model.generate = generated
        return generate_rows(source, 2, 12, 0, lambda *_: None, lambda: model)

    for failure in (AssertionError("its own"), torch.zeros(2, 5)):  # of any type; and rows that ended early
        with pytest.raises(SamplingError, match=r"cannot sample rows from this model \(.*--sampled-share 0"):
            rows(failure)
    for passed in (torch.OutOfMemoryError("of a GPU"), RuntimeError("DefaultCPUAllocator: can't allocate")):
        with pytest.raises(type(passed), match="of a GPU|allocate"):
            rows(passed)
