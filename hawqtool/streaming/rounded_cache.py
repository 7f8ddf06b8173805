"""Attentions that see keys, values and queries as an engine with a quantized KV cache does."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hawqtool.errors import InputError, UsageError
from hawqtool.formats.cache import KEY_LAYER, KEY_SCALE, VALUE_LAYER, VALUE_SCALE, CachedAttention
from hawqtool.model.block import LoadedBlock
from hawqtool.model.discovery import Structure
from hawqtool.model.tasks import model_task
from hawqtool.rounding.floats.cache import round_cached

_NAME = "hawqtool-cache"
"""Name under which transformers knows the attention function that looks at its inputs first."""

_HOOK = "seen_by_hawqtool"
"""Attribute of an attention with what looks at its inputs, and the name of its own function."""

Look = Callable[[CachedAttention, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From queries ``[rows, query heads, positions, width]``, keys and values to what attention is computed of."""


def cached_attentions(structure: Structure, model: Any) -> tuple[CachedAttention, ...]:
    """Attentions of a model whose keys and values engines cache, in order.

    Raises:
        UsageError: If there are none, or an engine would not look for scales of these keys and values.
    """
    if not model_task(model).generates or getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"--kv-cache: {type(model).__name__} is no decoder that writes text token by token, so that engines keep "
            "no keys and values of it; drop the flag"
        )
    shared = next((name for name, part in model.named_modules() if getattr(part, "is_kv_shared_layer", False)), None)
    if shared is not None:
        raise UsageError(f"--kv-cache: {shared} {_OWN_WAY}")
    found = []
    for place, module in model.named_modules():
        keys = getattr(module, KEY_LAYER[1:], None)
        if keys is None or not place.startswith(structure.inside) or not getattr(module, "is_causal", False):
            continue
        width = getattr(module, "head_dim", 0)
        if getattr(module, VALUE_LAYER[1:], None) is None or not width:
            raise UsageError(f"--kv-cache: {place} {_OWN_WAY}")
        weight = f"{place}{KEY_LAYER}.weight"
        name = structure.stored_names.get(weight, weight).removesuffix(f"{KEY_LAYER}.weight")
        found.append(CachedAttention(name, place, keys.weight.shape[0] // width, width))
    if not found:
        raise UsageError(
            f"--kv-cache: no attention of {type(model).__name__} has layers k_proj and v_proj, beside which engines "
            "look for the scales of keys and values (fused and latent ones have none); drop the flag"
        )
    return tuple(found)


_OWN_WAY = (
    "computes keys and values in a way of its own (shared, latent or without v_proj), for which engines read no "
    "scales; drop the flag"
)


@dataclass(frozen=True)
class CacheRounding:
    """How keys and values of a model are rounded.

    Args:
        attentions: The attentions.
        scales: ``NAME.k_scale`` and ``NAME.v_scale`` of each, as they are stored (see `round_cached`).
        queries: Whether queries are rounded too, as vLLM does and transformers does not.
    """

    attentions: tuple[CachedAttention, ...] = ()
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    queries: bool = True

    @contextmanager
    def applied(self, block: LoadedBlock) -> Iterator[None]:
        """While the context lasts, attentions of a block get rounded keys and values, and queries rounded to E4M3.

        Queries have the scale 1: vLLM rounds them on every NVIDIA card, as its kernels multiply FP8 by FP8.
        """
        with looked_at(block, self.attentions, self._round):
            yield

    def _round(
        self, attention: CachedAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_keys, of_values = self.scales[attention.name + KEY_SCALE], self.scales[attention.name + VALUE_SCALE]
        return (
            round_cached(query) if self.queries else query,
            round_cached(key, of_keys.to(key.device)),
            round_cached(value, of_values.to(key.device)),
        )


@contextmanager
def looked_at(block: LoadedBlock, attentions: Sequence[CachedAttention], look: Look) -> Iterator[None]:
    """While the context lasts, attentions of a block compute from what ``look`` makes of their inputs."""
    prefix, changed = f"{block.spec.name}.", list[tuple[Any, Any]]()
    here = [attention for attention in attentions if attention.module.startswith(prefix)]
    for attention in here:
        module: Any = block.module.get_submodule(attention.module.removeprefix(prefix))
        changed.append((module, module.config))
        setattr(module, _HOOK, (partial(look, attention), module.config._attn_implementation))
        # A copy of its own, so that attentions that are not cached keep their function.
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        for module, config in changed:
            module.config = config
            delattr(module, _HOOK)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The attention function of a module, on what the hook makes of its inputs."""
    look, own = getattr(module, _HOOK)
    default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, default)
    return function(module, *look(query, key, value), *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


class CachePeaks:
    """Largest magnitudes of keys and values by head, over all rows that blocks are run on inside `seen`."""

    def __init__(self, attentions: tuple[CachedAttention, ...]) -> None:
        self.attentions = attentions
        self.peaks: dict[str, Tensor] = {}

    @contextmanager
    def seen(self, block: LoadedBlock) -> Iterator[None]:
        """While the context lasts, keys and values of a block are looked at.

        Raises:
            InputError: If an attention of it was not run, or has other heads than its layers say.
        """
        with looked_at(block, self.attentions, self._look):
            yield
        for attention in self.attentions:
            inside = attention.module.startswith(f"{block.spec.name}.")
            if inside and self.peaks.get(attention.name + KEY_SCALE, torch.empty(0)).shape != (attention.heads,):
                raise InputError(f"--kv-cache: {attention.name} {_OWN_WAY}")

    def _look(
        self, attention: CachedAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        for suffix, states in ((KEY_SCALE, key), (VALUE_SCALE, value)):
            found = states.abs().amax((0, 2, 3)).float().cpu()
            name = attention.name + suffix
            self.peaks[name] = torch.maximum(self.peaks[name], found) if name in self.peaks else found
        return query, key, value
