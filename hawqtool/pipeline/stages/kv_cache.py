"""Calibrate the scales of a KV cache, and measure what an FP8 cache costs by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.formats.cache import CachedAttention, cache_scale
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.records import Rows
from hawqtool.report.schema import KvCache
from hawqtool.streaming.block import advance
from hawqtool.streaming.rounded_cache import CachePeaks, CacheRounding
from hawqtool.streaming.stream import ModelStream

_KEY = "kv-cache"
"""Key under which peaks and the record are saved."""

_ROWS = 4
"""Rows on which the cache alone is judged."""


def calibrate_cache(context: RunContext, sets: dict[str, Rows]) -> KvCache | None:
    """Calibrate the scales of the KV cache on the original, and measure its cost there.

    Args:
        context: The run; its store keeps the result.
        sets: Rows by role; those of calibration get the scales.

    Returns:
        The record; None where the cache stays in 16 bits.

    Raises:
        InputError: If an attention computes in a way of its own.
        NumericalError: If the model's states are not finite.
    """
    job, known = context.job, context.saved.load(_KEY)
    attentions = job.caches
    if not attentions:
        return None
    if known is None:
        context.reporter.say("calibrating the KV cache")
        peaks = cache_peaks(context, attentions, sets["calibration"].tokens)
        known = {"peaks": {name: values.tolist() for name, values in peaks.items()}}
    scales = stored_scales(attentions, known["peaks"], job.config.kv_cache)
    sets["calibration"] = replace(sets["calibration"], cache_scales=scales)
    if "record" not in known:
        known["record"] = _judged(job, CacheRounding(attentions, scales), sets)
        context.saved.save(_KEY, known)
        context.reporter.say(f"FP8 cache by itself: KL {known['record']['kl']:.2g} nats per token")
    return cast(KvCache, known["record"])


def cache_peaks(context: RunContext, attentions: tuple[CachedAttention, ...], rows: Tensor) -> dict[str, Tensor]:
    """Largest magnitudes of the original's keys (after rotary embedding) and values, ``[heads]`` by scale's name.

    Args:
        context: The run.
        attentions: Attentions of the model.
        rows: ``[rows, seq_len]`` tokens.
    """
    job, found = context.job, CachePeaks(attentions)
    stream = job.unrotated().stream()
    activations = stream.embed(rows, job.settings.batch_size)
    stream.release_ends()
    tell = context.progress("calibrating the KV cache")
    for spec in job.structure.blocks:
        with stream.block(spec.index) as block, found.seen(block):
            advance(block, activations)
        tell(spec.index + 1, len(job.structure.blocks))
    return found.peaks


def stored_scales(
    attentions: tuple[CachedAttention, ...], peaks: dict[str, list[float]], cache_format: str
) -> dict[str, Tensor]:
    """Scales as they are stored, by name: of all heads together, or of each."""
    found = {}
    for attention in attentions:
        for part in attention.parts(cache_format):
            heads = peaks[attention.name + part.suffix]
            values = [cache_scale(peak) for peak in (heads if len(part.shape) > 1 else [max(heads)])]
            found[attention.name + part.suffix] = torch.tensor(values, dtype=torch_dtype(part.dtype)).view(part.shape)
    return found


def _judged(job: Job, cache: CacheRounding, sets: dict[str, Rows]) -> KvCache:
    """What the cache costs the original, on rows of the report if there are any, and what it takes."""
    role = "report" if "report" in sets else "calibration"
    rows = sets[role].tokens[:_ROWS]
    numbers = sum(attention.cached_values for attention in cache.attentions)
    return {
        "format": job.config.kv_cache,
        "attentions": len(cache.attentions),
        "bytes_per_token": numbers,
        "bytes_per_token_16_bit": 2 * numbers,
        "kl": cache_kl(job.unrotated().stream(dtype=torch.float32), cache, rows),
        "rows": len(rows),
    }


def cache_kl(original: ModelStream, cache: CacheRounding, rows: Tensor) -> float:
    """Mean KL in nats per token of a model with a rounded cache, queries rounded too, from the same model without.

    Args:
        original: The model, computing in float32.
        cache: How its keys and values are rounded.
        rows: ``[rows, seq_len]`` tokens.
    """
    without, states = original.cache, original.final_hidden(rows, 1, lambda _: None)
    original.cache = cache
    rounded = original.final_hidden(rows, 1, lambda _: None)
    original.cache = without
    return OutputComparison(original, original, rows, states).evaluation(rounded).divergence
