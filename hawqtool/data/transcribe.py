"""Tokens that a speech-to-text model gives for sounds without a transcript."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hawqtool.data.generate import SampledModel, load_sampled

_BATCH_ROWS = 16


def transcribe(source: SampledModel, sounds: Tensor, before: list[int], positions: int) -> Tensor:
    """Decode sounds greedily; the end token is never taken, so that all rows have one length.

    Args:
        source: The model.
        sounds: ``[rows, ...]`` as its encoder takes them.
        before: Tokens that the decoder begins with.
        positions: Tokens of a row, those among them.

    Returns:
        ``[rows, positions]`` int64 on the CPU.

    Raises:
        InputError: If transformers cannot load the model.
        NumericalError: If its weights are not finite.
    """
    model = load_sampled(source, before[0])
    encoder, ends = model.get_encoder(), _end_tokens(model, source.tokenizer)
    found: list[Tensor] = []
    with torch.no_grad():
        for part in sounds.split(_BATCH_ROWS):
            encoded = encoder(part.to(source.device, source.dtype))
            tokens, cache = torch.tensor([before] * len(part), device=source.device)[:, :positions], None
            while tokens.shape[1] < positions:
                given = tokens if cache is None else tokens[:, -1:]
                result = model(encoder_outputs=encoded, decoder_input_ids=given, past_key_values=cache, use_cache=True)
                logits = result.logits[:, -1].index_fill(-1, torch.tensor(ends, device=source.device), -torch.inf)
                tokens, cache = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1), result.past_key_values
            found.append(tokens.cpu())
    return torch.cat(found)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text, of the config and of the tokenizer."""
    named = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    found = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({token for token in found if token is not None})
