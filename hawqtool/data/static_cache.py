"""Sampling with a cache of fixed size, whose step a GPU records once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_GROUPED = "hawqtool_grouped"
"""Name of `grouped_attention` in transformers."""
_STEPS_TOLD = 32
"""Steps after which the host waits for the GPU, so that progress is true."""

_CHANGING_ROTATIONS = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on the length of a row."""


def takes_static_cache(model: Any, seq_len: int) -> bool:
    """Whether a step of a model is the same operations whatever its tokens are, with a cache of fixed size.

    It is where transformers compiles the model as a whole, positions are told by rotations that no length changes, all
    layers see all tokens, and no experts are chosen.

    Args:
        model: The model.
        seq_len: Tokens that the cache holds.
    """
    config, names = model.config.get_text_config(), [name for name, _ in model.named_modules()]
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    window = getattr(config, "sliding_window", None) or seq_len
    rotations = repr(getattr(config, "rope_parameters", None))
    return (
        model._can_compile_fullgraph
        and not model._is_stateful
        and kinds == {"full_attention"}
        and window >= seq_len
        and any("rotary" in name for name in names)
        and not any("expert" in name for name in names)
        and not getattr(config, "alibi", False)
        and not any(kind in rotations for kind in _CHANGING_ROTATIONS)
    )


def static_cache_rows(
    model: Any, start: Tensor, seq_len: int, tell: Callable[[int], None], never: Sequence[int] = ()
) -> Tensor:
    """Rows ``[rows, seq_len]`` that continue ``[rows, 1]`` tokens, sampled at temperature 1 with a cache of fixed size.

    On a GPU a step is recorded once as a graph of its kernels: beside one of an 8B model the host, calling its
    operations one by one, takes ten times as long.

    Args:
        model: See `takes_static_cache`.
        start: First tokens.
        seq_len: Tokens per row.
        tell: Called with the tokens per row that are sampled.
        never: Tokens that are not to be sampled.
    """
    from transformers import StaticCache

    cache, device = StaticCache(config=model.config, max_cache_len=seq_len), start.device
    tokens, token = start.repeat(1, seq_len), start.clone()
    place = torch.zeros(1, dtype=torch.long, device=device)
    without = torch.tensor(never, dtype=torch.long, device=device)
    mask = torch.full((len(start), 1, 1, seq_len), torch.finfo(model.dtype).min, dtype=model.dtype, device=device)

    def step() -> None:
        mask.index_fill_(3, place, 0.0)
        at = place[None].expand(len(start), 1)
        known: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        logits = model(input_ids=token, position_ids=at, cache_position=place, **known).logits[:, -1].float()
        token.copy_(draw_tokens(logits.index_fill_(-1, without, -torch.inf).softmax(-1)))
        tokens.index_copy_(1, place.add_(1).clamp(max=seq_len - 1), token)

    with _grouped(model):
        again = step if device.type == "cpu" else _recorded(step)
        place.zero_()
        token.copy_(start)
        mask.fill_(torch.finfo(model.dtype).min)
        cache.reset()
        for done in range(2, seq_len + 1):
            again()
            if done % _STEPS_TOLD == 0 and device.type == "cuda":
                torch.cuda.synchronize(device)
            tell(done)
    return tokens


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one position a row, as transformers calls it; heads that share keys and values read them once.

    Its own implementations make copies for all heads, of the whole cache in every step: with 600 rows of an 8B model
    that takes longer than all weights.

    Args:
        module: The layer.
        query: ``[rows, heads, 1, size]``.
        key: ``[rows, groups, positions, size]``; neighbouring heads are one group.
        value: Of the same shape.
        attention_mask: ``[rows, 1, 1, positions]``, added to the logits.
        scaling: Factor of the logits.

    Returns:
        ``[rows, 1, heads, size]``, and no weights.
    """
    rows, heads, size = len(query), query.shape[1], query.shape[3]
    grouped = query.reshape(rows, key.shape[1], -1, size)
    logits = (grouped @ key.transpose(2, 3)).float() * scaling + attention_mask
    found = logits.softmax(-1).to(value.dtype) @ value
    return found.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def _grouped(model: Any) -> Iterator[None]:
    """While the context lasts, a model whose attention is plain uses `grouped_attention`."""
    from transformers import AttentionInterface

    config, before = model.config.get_text_config(), model.config._attn_implementation
    odd = getattr(config, "attn_logit_softcapping", None) or any("sink" in name for name, _ in model.named_parameters())
    if odd or before != "sdpa":
        yield
        return
    AttentionInterface.register(_GROUPED, grouped_attention)
    model.set_attn_implementation(_GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def draw_tokens(probabilities: Tensor) -> Tensor:
    """A token per row ``[rows, 1]`` int64 from ``[rows, classes]`` probabilities, without waiting for a GPU.

    The largest p / E, with E of the exponential distribution, is the token i with probability p_i.
    """
    return probabilities.div(torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A step as a graph of a GPU's kernels; it is run a few times for that."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazily made handles and buffers must be there before
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
