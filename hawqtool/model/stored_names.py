"""Under which name a checkpoint stores each parameter and buffer of the model that transformers builds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.stacked_experts import split_stacked

UNJOINED = "it has no rule that joins experts of this model which are stored one by one"
"""Why transformers cannot load packed experts that the original stores stacked."""

_MERGED = ("MergeModulelist", "Concatenate")


def stored_names(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Name of a parameter or stored buffer to its stored name, for every tensor that becomes one as it is.

    transformers renames many tensors while loading (old layer names, the prefix of a base model, experts); the
    same rules are applied here. Tensors that it would cut or join otherwise are left out.

    Args:
        model: Skeleton, its experts split (`hawqtool.model.experts`).
        tensors: Names in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    experts = [rule for t in transforms if t not in renamings for rule in _expert_rules(t)]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)} | dict(
        stored_buffers(model)
    ).keys()
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for stored in tensors:
        name, _ = rename_source_key(stored, renamings, [])
        for pattern, replacement in experts:
            name = pattern.sub(replacement, name)
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in parameters:
                # A tensor under its own name wins over one that is renamed to it.
                if candidate not in names or stored == candidate:
                    names[candidate] = stored
                break
    return names


def stored_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds, by name: not those that are computed anew in constructors."""
    for path, owner in module.named_modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                yield f"{path}.{leaf}" if path else leaf, buffer


def with_stored_experts_split(model: Any, index: CheckpointIndex) -> CheckpointIndex:
    """The index with one matrix per expert and role, for experts that the model splits and the checkpoint stacks.

    Args:
        model: Skeleton, its experts split.
        index: The checkpoint.
    """
    used = set(stored_names(model, split_stacked(index, lambda _: True).tensors).values())
    return split_stacked(index, lambda experts: f"{experts}.0.down_proj.weight" in used)


def joins_experts(model: Any) -> bool:
    """Whether transformers joins experts that a checkpoint of this model stores one by one, under our names."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    sources = [source for rule in get_model_conversion_mapping(model) for source in rule.source_patterns]
    return any(source.removesuffix("$").endswith("experts.*.down_proj.weight") for source in sources)


def _expert_rules(converter: Any) -> list[tuple[re.Pattern[str], str]]:
    """From stored per-expert names to those of `SplitExperts`, out of transformers' rule that stacks them."""
    if any(type(operation).__name__ not in _MERGED for operation in converter.operations):
        return []
    target = converter.target_patterns[0].rpartition(".")[2]
    roles = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}.get(
        target, ()
    )
    if len(roles) != len(converter.source_patterns):
        return []
    rules = []
    for source, role in zip(converter.source_patterns, roles, strict=True):
        # Some patterns are regular expressions, others plain names.
        head, _, leaf = source.removesuffix("$").replace("\\.", ".").partition(".*.")
        pattern = rf"{re.escape(head)}\.(\d+)\.{re.escape(leaf)}$"
        rules.append((re.compile(pattern), rf"{head}.\1.{role}.weight"))
    return rules
