"""Rows sampled from the model itself, so that calibration needs no data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.reader import check_finite
from hawqtool.data.static_cache import static_cache_rows, takes_static_cache
from hawqtool.errors import HawqError, InputError, NumericalError, SamplingError, one_line

CAUSAL = "AutoModelForCausalLM"
BATCH_ROWS = 64
"""Rows that are sampled at a time on a CPU, and of a model whose cache has a size that its config does not tell."""

_MOST_ROWS, _FEWEST_ROWS = 1024, 8
"""Rows that a GPU samples at a time, where caches and logits have room: a step takes hardly longer for many."""
_LOGIT_BYTES = 16
"""Per logit of a step: itself, in float32, its probability and what is drawn for it."""

_PLACEHOLDERS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))
"""What configurations call tokens that stand for something else than text."""


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
        room: Bytes of a GPU's memory that the run may use beside the weights; None where nothing limits it.
    """

    folder: Path
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    auto_class: str = CAUSAL
    room: int | None = None

    @property
    def first_token(self) -> int:
        """The token that a row begins with, and that fills up rows.

        Raises:
            InputError: If the tokenizer names none.
        """
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        first: int | None = next((token for token in known if token is not None), None)
        if first is None:
            raise InputError("the tokenizer names no begin or end token to start from; give --calibration a text")
        return first


def generate_rows(
    source: SampledModel,
    num_rows: int,
    seq_len: int,
    seed: int,
    progress: Callable[[int, int], None],
    load: Callable[[], Any] | None = None,
) -> Tensor:
    """Sample rows at temperature 1 from the beginning-of-text token, batched, with a key-value cache.

    An end-of-text token does not end a row: the model goes on with a new text, as in packed training rows.

    Args:
        source: The model.
        num_rows: Rows to sample.
        seq_len: Tokens per row, the first one included.
        seed: Seed of the sampling; the global random state is left as it was.
        progress: Called after every step with tokens done and tokens in all.
        load: Gives what `load_sampled` does (default: it is called).

    Returns:
        ``[num_rows, seq_len]`` int64 on the CPU.

    Raises:
        InputError: If the tokenizer names no token to begin with.
        SamplingError: If transformers cannot load the model, or not sample from it.
        NumericalError: If weights or logits are not finite.
    """
    first, device = source.first_token, source.device
    model = load_sampled(source) if load is None else load()
    parts = []
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad(), _foreign_errors(source.folder):
        torch.manual_seed(seed)
        logits = model(torch.full((1, 1), first, device=device)).logits
        if not bool(torch.isfinite(logits).all()):
            raise NumericalError("the original model gives logits that are NaN or Inf; check its weights")
        never = never_sampled(model, logits.shape[-1])
        most = batch_rows(model.config, seq_len, source) if cuda else BATCH_ROWS
        together = math.ceil(num_rows / max(1, math.ceil(num_rows / most))) if cuda else most
        recorded = cuda and source.auto_class == CAUSAL and takes_static_cache(model, seq_len)
        sample = static_cache_rows if recorded else _rows_by_transformers
        for begin in range(0, num_rows, together):
            count = min(together, num_rows - begin)
            start = torch.full((count, 1), first, dtype=torch.long, device=device)

            def tell(done: int, begin: int = begin, count: int = count) -> None:
                progress(begin * seq_len + count * done, num_rows * seq_len)

            parts.append(sample(model, start, seq_len, tell, never).cpu())
            if parts[-1].shape != (count, seq_len):
                raise ValueError(f"rows of {parts[-1].shape[-1]} tokens, not of {seq_len}")
    return torch.cat(parts)


def never_sampled(model: Any, classes: int) -> list[int]:
    """Tokens that are left out of sampled rows: those that stand for images or sounds, and those without embedding.

    Args:
        model: The model, of transformers.
        classes: Tokens that its head tells apart.
    """
    known = getattr(model.get_input_embeddings(), "weight", None)
    found = set(range(classes if known is None else known.shape[0], classes))
    named = [getattr(model.config, name, None) for name in _PLACEHOLDERS]
    return sorted(found.union(token for token in named if isinstance(token, int) and 0 <= token < classes))


def _rows_by_transformers(
    model: Any, start: Tensor, seq_len: int, tell: Callable[[int], None], never: Sequence[int]
) -> Tensor:
    """What `static_cache_rows` gives, of any model."""
    from transformers import GenerationConfig, StoppingCriteriaList

    def step(tokens: Tensor, _scores: Any, **_: Any) -> Tensor:
        tell(tokens.shape[1])
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seq_len - 1, pad_token_id=int(start[0]),
        suppress_tokens=list(never) or None,
    )  # fmt: skip
    hook = StoppingCriteriaList([step])  # never stops the sampling, but sees every step of it
    mask = torch.ones_like(start)
    rows: Tensor = model.generate(start, attention_mask=mask, generation_config=settings, stopping_criteria=hook)
    return rows


def batch_rows(config: Any, seq_len: int, source: SampledModel) -> int:
    """Rows to sample at a time on a GPU, so that their caches and logits take at most half of the room.

    Args:
        config: The model's, of transformers.
        seq_len: Tokens per row.
        source: The model.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    layers, size = getattr(text, "num_hidden_layers", None), getattr(text, "head_dim", None)
    if source.room is None or not isinstance(heads, int) or not isinstance(layers, int):
        return BATCH_ROWS
    size = size or text.hidden_size // text.num_attention_heads
    cache = 2 * layers * heads * size * seq_len * source.dtype.itemsize
    rows = _MOST_ROWS
    while rows > _FEWEST_ROWS and 2 * rows * (cache + _LOGIT_BYTES * text.vocab_size) > source.room:
        rows //= 2
    return rows


def load_sampled(source: SampledModel, padding: int | None = None) -> Any:
    """The whole model, whatever its own generation settings are.

    Args:
        source: The model.
        padding: Token that fills up rows (default: the first one of a row).

    Raises:
        SamplingError: If transformers cannot load it.
        NumericalError: If weights are not finite.
    """
    import transformers

    # The checkpoint's own generation settings (an end token, a top-k) must not shape the rows; they are not read.
    neutral = transformers.GenerationConfig(pad_token_id=source.first_token if padding is None else padding)
    with _foreign_errors(source.folder, loading=True), _no_progress_bars():
        model: Any = getattr(transformers, source.auto_class).from_pretrained(
            source.folder,
            dtype=source.dtype,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            generation_config=neutral,
            device_map=_placed(source.device),
        )
    model.config.return_dict = True
    model.to(source.device).eval()
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    return model


def _placed(device: torch.device) -> dict[str, torch.device] | None:
    """Where transformers puts all weights, several at a time: on a GPU, if it can; None for the CPU, one by one."""
    return {"": device} if device.type == "cuda" and util.find_spec("accelerate") is not None else None


@contextmanager
def _foreign_errors(folder: Path, loading: bool = False) -> Iterator[None]:
    """Turn what transformers, or code of a checkpoint, raises into a SamplingError, but not that memory gave out.

    Args:
        folder: The checkpoint.
        loading: Whether the model is loaded, or sampled from.
    """
    try:
        yield
    except (HawqError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of any type
        if "DefaultCPUAllocator" in str(error) or (isinstance(error, OSError) and not loading):  # of the terminal
            raise
        if loading:
            raise SamplingError(
                f"{folder}: transformers cannot load this model to sample rows from it ({one_line(error)}); correct "
                "that, or sample none: give texts for --calibration and --selection-data, and --sampled-share 0"
            ) from error
        raise SamplingError(
            f"{folder}: transformers cannot sample rows from this model ({one_line(error)}); sample none: give texts "
            "for --calibration and --selection-data, and --sampled-share 0"
        ) from error


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
