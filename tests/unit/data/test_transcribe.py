"""Greedy transcripts against a decoder that is run on all its tokens at every step."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from hawqtool.data.generate import SampledModel
from hawqtool.data.transcribe import transcribe
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_zoo import BANDS, FRAMES, kind_named, save_kind


def test_tokens_are_the_likeliest_but_the_end(tmp_path: Path) -> None:
    folder = save_kind(kind_named("whisper"), tmp_path, torch.float32)
    sounds = torch.randn(3, BANDS, FRAMES, generator=torch.Generator().manual_seed(0))
    tokenizer = tiny_tokenizer()
    source = SampledModel(folder, tokenizer, torch.device("cpu"), torch.float32, auto_class="AutoModelForSpeechSeq2Seq")
    found = transcribe(source, sounds, [0, 9], 12)
    assert found.shape == (3, 12) and found[:, :2].tolist() == [[0, 9]] * 3
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    ends = {1, tokenizer.eos_token_id}
    tokens = torch.tensor([[0, 9]] * 3)
    while tokens.shape[1] < 12:
        with torch.no_grad():
            logits = model(input_features=sounds, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
        logits[:, list(ends)] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, tokens)
