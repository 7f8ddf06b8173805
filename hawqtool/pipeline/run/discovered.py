"""What the headers of a checkpoint say: where it lies, the model without weights, its layers, whether it is rotated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hawqtool.allocation.special_formats import has_format
from hawqtool.checkpoint.content import ContentRecord
from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.originals.recognition import read_original
from hawqtool.checkpoint.source import ResolvedModel, hub_id, resolve_model
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.discovery import Structure, check_shapes, discover
from hawqtool.model.loading.original import cache_obstacle, precision_obstacle, scale_obstacle
from hawqtool.model.rotation.choice import choose_rotation
from hawqtool.model.skeleton import build_skeleton, untie_stored
from hawqtool.model.stored_names import ONE_EXPERT, UNJOINED, UNPACKED, joins_experts, with_stored_experts_split
from hawqtool.model.vision import read_images
from hawqtool.runtime.reporter import Reporter
from hawqtool.streaming.rounded_cache import cached_attentions


@dataclass(frozen=True)
class Discovered:
    """A checkpoint as its headers show it.

    Args:
        probe: The model without weights, in float32.
        rotation: Whether the residual stream is rotated, and why.
        index: Headers, with stacked experts one by one, and rotated where the model is.
        structure: Blocks, linears, input groups.
    """

    probe: Any
    rotation: str
    index: CheckpointIndex
    structure: Structure


def find_source(config: RunConfig, reporter: Reporter) -> ResolvedModel:
    """The checkpoint; says what takes long and what is dangerous."""
    if hub_id(config.model):
        reporter.say(f"fetching {config.model} from the hub, unless it is in the cache")
    for warning in (source := resolve_model(config.model, config.trust_remote_code)).warnings:
        reporter.warn(warning)
    return source


def discover_checkpoint(config: RunConfig, source: ResolvedModel, writes: bool) -> Discovered:
    """Build the model without weights and find its layers.

    Args:
        config: The run's configuration.
        source: Where the checkpoint lies.
        writes: Whether a packed folder will come of it; then what its profile's engines do not load is refused.

    Raises:
        HawqError: If headers and model disagree, or the model cannot be packed so.
    """
    stored_index = replace(read_original(source.folder), content=ContentRecord())
    vllm, alone = config.profile == "vllm", config.profile == "transformers"
    probe: Any = build_skeleton(stored_index.folder, torch.float32, source.runs_code, stored_index.tensors, vllm)
    index = with_stored_experts_split(probe, stored_index)
    if config.quantize_vision:
        read_images(probe)
    if not writes and config.rotate == "auto":
        config = config.model_copy(update={"rotate": "off"})  # the original is looked at, not rounded
    rotation = choose_rotation(config, source, probe, index)
    index = rotation.index
    if index.rotation is not None:
        untie_stored(probe, index.tensors)
        probe.all_tied_weights_keys = {}  # as the written config.json has it
    cache = cache_obstacle(probe)
    structure = discover(probe, index, vllm, config.quantize_lm_head, not alone, not vllm, config.keeps_weight_names)
    obstacle = structure.obstacle or _expert_obstacle(probe, structure, vllm) or cache
    obstacle = obstacle or _dtype_obstacle(probe, source, index, structure)
    if writes and config.kv_cache != "none":
        obstacle = _heads_obstacle(probe, structure) or obstacle
    if writes and obstacle and not vllm:
        raise InputError(
            f"{config.model}: transformers cannot load this model when it is packed: {obstacle}; "
            "--profile vllm writes it for vLLM alone"
        )
    check_shapes(probe, structure, index)
    structure = replace(structure, obstacle=obstacle)
    if config.plan is None:
        structure = structure.without_undivided(lambda unit: has_format(config, unit), index)
    return Discovered(probe, rotation.text, index, structure)


def _expert_obstacle(probe: Any, structure: Structure, vllm: bool) -> str | None:
    """Why transformers cannot load the experts of the model when they are packed."""
    if vllm and any(map(is_expert, structure.linears)) and not joins_experts(probe):
        return UNJOINED
    single = any(ONE_EXPERT.search(name) for c in structure.conversions.values() for _, name in c.sources)
    return UNPACKED if single else None


def _heads_obstacle(probe: Any, structure: Structure) -> str | None:
    """Why compressed-tensors cannot load scales of the KV cache; it sizes them by an entry that OPT does without."""
    cached_attentions(structure, probe)  # refuses models of which engines keep no such keys and values
    text: Any = probe.config.get_text_config(decoder=True)
    if hasattr(text, "num_key_value_heads"):
        return None
    return f"for --kv-cache compressed-tensors reads num_key_value_heads, which {type(text).__name__} lacks (drop it)"


def _dtype_obstacle(probe: Any, source: ResolvedModel, index: CheckpointIndex, structure: Structure) -> str | None:
    """Why transformers cannot run the model in the dtype of its weights, packed or not."""
    linears = [linear.module_name for linear in structure.linears.values()]
    if not linears:
        return None
    dtype = stored_dtype(index, structure)
    return scale_obstacle(probe, linears, dtype) or precision_obstacle(
        probe, dtype, lambda: build_skeleton(index.folder, dtype, source.runs_code, index.tensors)
    )


def stored_dtype(index: CheckpointIndex, structure: Structure) -> torch.dtype:
    """The dtype of the first linear."""
    return torch_dtype(index.tensors[f"{next(iter(structure.linears))}.weight"].dtype)
