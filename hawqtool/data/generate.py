"""Rows sampled from the model itself, so that calibration needs no data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.reader import check_finite
from hawqtool.errors import InputError, NumericalError, one_line

BATCH_ROWS = 64


@dataclass(frozen=True)
class SampledModel:
    """The whole model that rows are sampled from.

    Args:
        folder: Checkpoint.
        tokenizer: Its tokenizer, for the first token.
        device: Where to run.
        dtype: dtype of the weights.
        trust_remote_code: Whether code from the checkpoint may run.
        auto_class: Class of transformers that loads it.
    """

    folder: Path
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    auto_class: str = "AutoModelForCausalLM"


def generate_rows(
    source: SampledModel, num_rows: int, seq_len: int, seed: int, progress: Callable[[int, int], None]
) -> Tensor:
    """Sample rows at temperature 1 from the beginning-of-text token, batched, with a key-value cache.

    An end-of-text token does not end a row: the model goes on with a new text, as in packed training rows.

    Args:
        source: The model.
        num_rows: Rows to sample.
        seq_len: Tokens per row, the first one included.
        seed: Seed of the sampling; the global random state is left as it was.
        progress: Called after every step with tokens done and tokens in all.

    Returns:
        ``[num_rows, seq_len]`` int64 on the CPU.

    Raises:
        InputError: If the tokenizer names no token to begin with, or transformers cannot load the model.
        NumericalError: If weights or logits are not finite.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    tokenizer, device = source.tokenizer, source.device
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise InputError("the tokenizer names no begin or end token to start from; give --calibration a text")
    model = load_sampled(source, first)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seq_len - 1, pad_token_id=first
    )
    parts = []
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.manual_seed(seed)
        if not bool(torch.isfinite(model(torch.full((1, 1), first, device=device)).logits).all()):
            raise NumericalError("the original model gives logits that are NaN or Inf; check its weights")
        for begin in range(0, num_rows, BATCH_ROWS):
            count = min(BATCH_ROWS, num_rows - begin)
            start = torch.full((count, 1), first, dtype=torch.long, device=device)

            def step(tokens: Tensor, _scores: Any, begin: int = begin, count: int = count, **_: Any) -> Tensor:
                progress(begin * seq_len + tokens.numel(), num_rows * seq_len)
                return torch.zeros(count, dtype=torch.bool, device=tokens.device)

            hook = StoppingCriteriaList([step])  # never stops the sampling, but sees every step of it
            mask = torch.ones_like(start)
            rows = model.generate(start, attention_mask=mask, generation_config=settings, stopping_criteria=hook)
            parts.append(rows.cpu())
    return torch.cat(parts)


def load_sampled(source: SampledModel, padding: int) -> Any:
    """The whole model, whatever its own generation settings are.

    Args:
        source: The model.
        padding: Token that fills up rows.

    Raises:
        InputError: If transformers cannot load it.
        NumericalError: If weights are not finite.
    """
    import transformers

    # The checkpoint's own generation settings (an end token, a top-k) must not shape the rows; they are not read.
    neutral = transformers.GenerationConfig(pad_token_id=padding)
    try:
        with _no_progress_bars():
            model: Any = getattr(transformers, source.auto_class).from_pretrained(
                source.folder,
                dtype=source.dtype,
                trust_remote_code=source.trust_remote_code,
                use_safetensors=True,
                generation_config=neutral,
            )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise InputError(
            f"{source.folder}: transformers cannot load this model to sample rows from it ({one_line(error)}); "
            "correct that, or give --calibration and --selection-data texts"
        ) from error
    model.config.return_dict = True
    model.to(source.device).eval()
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    return model


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """While the context lasts, transformers draws no bars: nothing is printed but by the caller."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):  # the hub's library says so where its own bars stay off
            logging.enable_progress_bar()
