"""Under which name a checkpoint stores each parameter and buffer of the model that transformers builds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

UNPACKED = "it loads experts that are stored one by one only if all of them are packed"
"""Why transformers cannot load a packed folder that keeps such experts."""

_MERGED = ("MergeModulelist", "Concatenate")
_ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
ONE_EXPERT = re.compile(r"experts\.\d+\.")
"""What a stored name has in it of one expert."""
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


def loading_names(
    model: Any, blocks: Sequence[str], index: CheckpointIndex
) -> tuple[dict[str, str], dict[str, Conversion]]:
    """Stored names of all parameters and buffers that are one tensor, and how the others are made.

    Args:
        model: Skeleton, its experts split.
        blocks: Names of its blocks.
        index: The checkpoint.
    """
    stored = _with_shared(model, blocks, stored_names(model, index.tensors))
    converted = _conversions(model, index, stored)
    return {n: tensor for n, tensor in stored.items() if n not in converted}, converted


def _with_shared(model: nn.Module, blocks: Sequence[str], stored: dict[str, str]) -> dict[str, str]:
    """Stored names of the parameters of blocks too that are stored under the name of another block's."""
    owners: dict[int, str] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        if name in stored:
            owners.setdefault(id(parameter), stored[name])
    prefixes = tuple(f"{block}." for block in blocks)
    inside = ((n, p) for n, p in parameters if n.startswith(prefixes) and id(p) in owners)
    return {n: owners[id(p)] for n, p in inside} | stored


@dataclass(frozen=True)
class Conversion:
    """How transformers makes a parameter of stored tensors that it joins, cuts or transposes while loading.

    Args:
        parameter: Name of the parameter or buffer.
        first: Name of the first one that the rule makes.
        sources: Pattern of the rule and stored name of each tensor, in the order in which they are joined.
        rule: The rule.
    """

    parameter: str
    first: str
    sources: tuple[tuple[str, str], ...]
    rule: Any

    def tensor(self, model: Any, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter's value.

        Args:
            model: The model, whose config and shapes some rules look at.
            read: Reads a stored tensor by name.
        """
        values: dict[str, Any] = {}
        for pattern, stored in self.sources:
            values.setdefault(pattern, []).append(read(stored))
        rule = self.rule
        known = {"source_patterns": rule.source_patterns, "target_patterns": rule.target_patterns, "missing_keys": None}
        for operation in rule.operations:
            values = operation.convert(values, full_layer_name=self.first, model=model, config=model.config, **known)
        prefix, suffix = _around(self.first, rule)
        found = {f"{prefix}{target}{suffix}": value for target, value in values.items()}[self.parameter]
        tensor: Tensor = found[0] if isinstance(found, list) else found
        return tensor


def _around(first: str, rule: Any) -> tuple[str, str]:
    """What stands before and behind the target of a rule in the first name that it makes."""
    prefix, _, suffix = first.partition(rule.target_patterns[0])
    return prefix, suffix


def _conversions(model: Any, index: CheckpointIndex, stored: Mapping[str, str]) -> dict[str, Conversion]:
    """Parameters and stored buffers that transformers makes of several tensors, or of parts, by name.

    Args:
        model: Skeleton, its experts split.
        index: The checkpoint.
        stored: See `stored_names`: what is one tensor of the right shape needs no conversion.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    rules: Any = [t for t in transforms if t not in renamings]
    shapes = {n: p.shape for n, p in (*model.named_parameters(remove_duplicate=False), *stored_buffers(model))}
    sources: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in sorted(index.tensors, key=dot_natural_key) if rules else ():
        first, pattern = rename_source_key(name, renamings, rules, model.base_model_prefix, shapes)
        if pattern is not None and first in shapes:
            sources[first].append((pattern, name))
    found = {}
    for first, parts in sources.items():
        rule = next(rule for rule in rules if parts[0][0] in rule.source_patterns)
        prefix, suffix = _around(first, rule)
        for target in rule.target_patterns:
            parameter = f"{prefix}{target}{suffix}"
            info = index.tensors.get(stored.get(parameter, ""))
            if parameter in shapes and (info is None or info.shape != tuple(shapes[parameter])):
                found[parameter] = Conversion(parameter, first, tuple(parts), rule)
    return found


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
        for candidate in () if ONE_EXPERT.search(info.name) else candidates(info.name):
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
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = (t for t in get_model_conversion_mapping(model) if hasattr(t, "operations"))
    if any(len(rule.target_patterns) > 1 and "experts" in rule.target_patterns[0] for rule in rules):
        return lambda *_: "the files number two sets of experts as one, of which texts reach one"
    return partial(_why_unread, vllm or joins_experts(model))


def joins_experts(model: Any) -> bool:
    """Whether transformers reads experts of a model that are stored one by one, under our names and packed.

    It has a rule that joins them, or builds them of linears for quantized checkpoints (Llama 4).
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as SEQUENTIAL

    kinds = {(m.replaces if isinstance(m, SplitExperts) else type(m)).__name__ for m in model.modules()}
    return expert_leaves(model) is not None or bool(kinds & SEQUENTIAL.keys())


def _why_unread(joined: bool, module: Any, layout: ExpertsLayout) -> str | None:
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
