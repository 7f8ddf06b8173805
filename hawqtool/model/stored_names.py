"""Under which name a checkpoint stores each parameter and buffer of the model that transformers builds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from hawqtool.checkpoint.fusion import MIXTRAL_LEAVES, VLLM_LEAVES, VLLM_LINEARIZED
from hawqtool.checkpoint.index import CheckpointIndex, ExpertStack
from hawqtool.checkpoint.stacked_experts import split_stacked
from hawqtool.model.experts import SplitExperts
from hawqtool.model.experts_layout import ExpertsLayout

UNJOINED = "it has no rule that joins experts of this model which are stored one by one"
"""Why transformers cannot load packed experts of such a model."""

_MERGED = ("MergeModulelist", "Concatenate")
_ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_ONE_EXPERT = re.compile(r"experts\.\d+\.")
_LEAVES = re.compile(rf"(experts\.\d+)\.({'|'.join(MIXTRAL_LEAVES.values())})\.(weight|bias)$")
_OF_LEAF = {leaf: role for role, leaf in MIXTRAL_LEAVES.items()}


def stored_names(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Name of a parameter or stored buffer to its stored name, for every tensor that becomes one as it is.

    transformers renames many tensors while loading (old layer names, the prefix of a base model, experts); the
    same rules are applied here. Tensors that it would cut or join otherwise are left out.

    Args:
        model: Skeleton, its experts split (`hawqtool.model.experts`).
        tensors: Names in the checkpoint.
    """
    candidates = _candidates(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)} | dict(
        stored_buffers(model)
    ).keys()
    names: dict[str, str] = {}
    for stored in tensors:
        for candidate in candidates(stored):
            if candidate in parameters:
                # A tensor under its own name wins over one that is renamed to it.
                if candidate not in names or stored == candidate:
                    names[candidate] = stored
                break
    return names


def _candidates(model: Any) -> Callable[[str], tuple[str, ...]]:
    """A function from a stored name to the names that the model may have for it, likelier ones first."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    experts = [rule for t in transforms if t not in renamings for rule in _expert_rules(t)]
    prefix = f"{model.base_model_prefix}."

    def candidates(stored: str) -> tuple[str, ...]:
        name, _ = rename_source_key(stored, renamings, [])
        for pattern, replacement in experts:
            name = pattern.sub(replacement, name)
        name = _LEAVES.sub(lambda match: f"{match[1]}.{_OF_LEAF[match[2]]}.{match[3]}", name)
        return name, prefix + name, name.removeprefix(prefix)

    return candidates


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
    split = {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    if not split:
        return index
    candidates, leaves = _candidates(model), _written_leaves(model)
    stacks: dict[str, ExpertStack] = {}
    for info in index.tensors.values():
        for candidate in () if _ONE_EXPERT.search(info.name) else candidates(info.name):
            experts, _, source = candidate.rpartition(".")
            roles = _ROLES.get(source.removesuffix("_bias"))
            if experts in split and roles is not None:
                layout, linears = split[experts].layout, tuple(leaves[role] for role in roles)
                leaf, name = "bias" if source.endswith("_bias") else "weight", _stored_experts(info.name, experts)
                transposed = leaf == "weight" and layout.is_stored_transposed(info.shape, source)
                stacks[info.name] = ExpertStack(name, linears, transposed, layout.concatenated, leaf)
                break
    return split_stacked(index, stacks)


def _stored_experts(stored: str, experts: str) -> str:
    """Stored name of the experts: up to the name that the module has, or to that of what holds it (Granite's files)."""
    *_, holder, own = experts.split(".")
    for part, rest in ((own, ""), (holder, f".{own}")):
        head, found, _ = f".{stored}".rpartition(f".{part}.")
        if found:
            return f"{head}.{part}{rest}".removeprefix(".")
    return stored.rpartition(".")[0]


def expert_leaves(model: Any) -> dict[str, str] | None:
    """Names of an expert's linears by role under which transformers joins experts that are stored one by one.

    None where it has no rule that does, hence reads the experts of this model stacked alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, str] = {}
    for transform in get_model_conversion_mapping(model):
        for role, _, leaf in _expert_sources(transform):
            found[role] = leaf.removesuffix(".weight")
    return found if {"up_proj", "down_proj"} <= found.keys() else None


def _written_leaves(model: Any) -> dict[str, str]:
    """Names of an expert's linears by role, for experts that the original stacks."""
    known = expert_leaves(model) or VLLM_LEAVES.get(getattr(model.config, "model_type", ""), {})
    return {role: known.get(role, role) for role in MIXTRAL_LEAVES}


def why_unread(model: Any, vllm: bool) -> Callable[[Any, ExpertsLayout], str | None]:
    """A function that says why no engine of a profile reads some experts one by one; None where one does.

    Args:
        model: The model, its experts not yet split.
        vllm: Whether vLLM alone is to read them, not transformers too.
    """
    return partial(_why_unread, vllm, vllm or expert_leaves(model) is not None)


def _why_unread(vllm: bool, joined: bool, module: Any, layout: ExpertsLayout) -> str | None:
    plain = not layout.transposed and layout.concatenated and not layout.biased
    if not plain and type(module).__name__ not in VLLM_LINEARIZED:
        return "no engine reads experts of this layout one by one"
    return None if joined else "transformers reads these experts stacked only; --profile vllm quantizes them"


def _expert_rules(converter: Any) -> list[tuple[re.Pattern[str], str]]:
    """From stored per-expert names to those of `SplitExperts`, out of transformers' rule that stacks them."""
    return [
        (re.compile(rf"{re.escape(head)}\.(\d+)\.{re.escape(leaf)}$"), rf"{head}.\1.{role}.weight")
        for role, head, leaf in _expert_sources(converter)
    ]


def _expert_sources(converter: Any) -> list[tuple[str, str, str]]:
    """Role, name before the number and name after it, for each source of a rule that stacks experts."""
    operations = getattr(converter, "operations", ())
    if not operations or any(type(operation).__name__ not in _MERGED for operation in operations):
        return []
    roles = _ROLES.get(converter.target_patterns[0].rpartition(".")[2], ())
    if len(roles) != len(converter.source_patterns):
        return []
    found = []
    for source, role in zip(converter.source_patterns, roles, strict=True):
        # Some patterns are regular expressions, others plain names.
        head, _, leaf = source.removesuffix("$").replace("\\.", ".").partition(".*.")
        found.append((role, head, leaf))
    return found
