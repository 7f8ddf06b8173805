"""The ``quantization_config`` of compressed-tensors, and how loaders match it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.errors import InputError
from hawqtool.formats import CHANNEL, MAX_BITS, MIN_BITS, QuantFormat, parse_label
from hawqtool.formats.activations import ACTIVATIONS
from hawqtool.formats.grids import GRIDS
from hawqtool.records import LayerFormats

METHOD = "compressed-tensors"
MIXED = "mixed-precision"
"""``format`` of a folder whose groups have several."""

STATUS = "compressed"


@dataclass(frozen=True)
class Target:
    """One entry of a group's ``targets``."""

    group: str
    pattern: str


def quantization_config(
    formats: LayerFormats,
    units: Mapping[str, str],
    other_linears: Sequence[str],
    aliases: Mapping[str, str],
    others: Iterable[str] = (),
) -> dict[str, Any]:
    """Build the ``quantization_config`` of ``config.json``.

    Targets are anchored regexes without the prefix of the block list, one per group and role, because engines
    know the same block under different prefixes; they hit each quantized module in exactly one group. Where two lists
    hold namesakes, as encoder and decoder do, the part before the list tells them apart.

    Args:
        formats: Format of every quantized module, by module name.
        units: Allocation unit of every quantized module.
        other_linears: Names of the linears that stay unquantized, such as ``lm_head``.
        aliases: Quantized module to its name in the model that transformers builds, where that differs: transformers
            matches its own names, other engines the stored ones.
        others: Further matrices of the checkpoint, such as a draft head's; those that a target hits are ignored too.

    Raises:
        InputError: If a unit mixes formats, or names are ambiguous without their prefix.
    """
    _check_units(formats, units)
    by_format: dict[QuantFormat, list[str]] = defaultdict(list)
    for module, quant_format in formats.items():
        by_format[quant_format] += [module, aliases[module]] if module in aliases else [module]
    shared = _shared_roles(formats)
    bare = _bare_roles((*formats, *aliases.values()), shared)
    groups = {
        quant_format.label: {
            "targets": sorted(_targets(modules, bare, shared)),
            "weights": _weights(quant_format),
            "input_activations": quant_format.activation_format.entry if quant_format.activation_format else None,
            "output_activations": None,
            "format": quant_format.layout,
        }
        for quant_format, modules in sorted(by_format.items(), key=_experts_first)
    }
    config = {
        "quant_method": METHOD,
        "format": top_format(quant_format.layout for quant_format in by_format),
        "quantization_status": STATUS,
        "config_groups": groups,
        "ignore": sorted(other_linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    quantized = {*formats, *aliases.values()}
    strays = {name for name in others if name not in quantized and matching_targets(config, name)}
    config["ignore"] = sorted(strays | set(other_linears))
    _check_hits(config, (*formats, *aliases.values()))
    return config


def _experts_first(group: tuple[QuantFormat, Sequence[str]]) -> tuple[bool, QuantFormat]:
    """Order of the groups: that of routed experts first.

    transformers unpacks routed experts by the first group whose targets say "experts", be it in ``shared_experts``.
    """
    quant_format, modules = group
    return not any(map(is_expert, modules)), quant_format


def top_format(layouts: Iterable[str]) -> str:
    """``format`` of a whole config from those of its groups."""
    found = set(layouts)
    return found.pop() if len(found) == 1 else MIXED


def _check_hits(config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Check that one target hits each quantized module, and ``ignore`` none."""
    for module in modules:
        hit = matching_targets(config, module)
        if len(hit) != 1 or is_ignored(config, module):
            found = ", ".join(target.pattern for target in hit)
            raise InputError(
                f"{module} is ignored or hit by {len(hit)} targets ({found}); expected one; "
                "its name is ambiguous without the prefix of its block list; exclude one of the namesakes"
            )


def hits(pattern: str, module: str) -> bool:
    """Whether an entry of ``targets`` or ``ignore`` hits a linear: exact name, ``re:`` regex, or class name."""
    if pattern.startswith("re:"):
        # Loaders use re.match: anchored at the start only.
        return _compiled(pattern[3:]).match(module) is not None
    return pattern in (module, "Linear")


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Kept without a limit: Python's own cache of 512 patterns is of no use to the many of a model with experts."""
    return re.compile(pattern)


def all_targets(config: Mapping[str, Any]) -> tuple[Target, ...]:
    """Every target of every group, in config order."""
    groups = config["config_groups"].items()
    return tuple(Target(name, pattern) for name, group in groups for pattern in group["targets"])


def matching_targets(config: Mapping[str, Any], module: str) -> tuple[Target, ...]:
    """Targets that hit a module, in config order."""
    return tuple(target for target in all_targets(config) if hits(target.pattern, module))


def is_ignored(config: Mapping[str, Any], module: str) -> bool:
    """Whether ``ignore``, which beats every target, hits a module."""
    return any(hits(pattern, module) for pattern in config["ignore"])


def module_format(config: Mapping[str, Any], module: str) -> QuantFormat:
    """Format that a loader gives to a packed module.

    Raises:
        InputError: If not exactly one group hits it, or the module is ignored.
    """
    groups = sorted({target.group for target in matching_targets(config, module)})
    if len(groups) != 1:
        found = " and ".join(groups) or "no group"
        raise InputError(f"packed module {module} is hit by {found}; expected one config group; fix the targets")
    if is_ignored(config, module):
        raise InputError(f"packed module {module} is hit by ignore; loaders would skip it; remove it from ignore")
    return group_format(config["config_groups"][groups[0]])


def group_format(group: Mapping[str, Any]) -> QuantFormat:
    """Format of a config group, from its ``weights`` and ``input_activations``.

    Raises:
        InputError: If it is none of those that are written.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    if weights.get("type") == "float":
        plain = next((label for label in GRIDS if _said(_weights(parse_label(label))) == _said(weights)), None)
        if plain is None:
            raise InputError(f"weights are floats of an unknown kind; expected those of {', '.join(GRIDS)}")
    else:
        plain = _integers(weights).label
    if not inputs:
        return parse_label(plain)
    known = (label for label in ACTIVATIONS if label.partition("-")[0] == plain)
    found = next((label for label in known if _said(ACTIVATIONS[label].entry) == _said(inputs)), None)
    if found is None:
        raise InputError(f"input_activations are not those of {plain} in any of {', '.join(ACTIVATIONS)}")
    return parse_label(found)


def _said(entry: Any) -> dict[str, Any]:
    """What an entry says; null says nothing."""
    return {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else {}


def _integers(weights: Mapping[str, Any]) -> QuantFormat:
    """Format of integers of a ``weights`` entry."""
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    size = weights.get("group_size")
    if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"num_bits is {bits!r}; expected {MIN_BITS} to {MAX_BITS}")
    symmetric = weights.get("symmetric")
    if weights.get("type") != "int" or not isinstance(symmetric, bool) or weights.get("dynamic") is not False:
        raise InputError("weights are not type int, symmetric true or false, dynamic false; only these are written")
    if strategy == "channel" and size in (None, -1):
        return QuantFormat(bits, CHANNEL, symmetric)
    if strategy == "group" and isinstance(size, int) and size > 0:
        return QuantFormat(bits, size, symmetric)
    raise InputError(
        f"strategy is {strategy!r} with group_size {size!r}; expected group and a size, or channel and null"
    )


def _check_units(formats: LayerFormats, units: Mapping[str, str]) -> None:
    seen: dict[str, tuple[str, QuantFormat]] = {}
    for module, quant_format in formats.items():
        first, expected = seen.setdefault(units[module], (module, quant_format))
        if quant_format != expected:
            raise InputError(
                f"{module} is {quant_format.label} and {first} is {expected.label}; engines fuse them into "
                f"{units[module]}: give them one format"
            )


def _weights(quant_format: QuantFormat) -> dict[str, Any]:
    floats = quant_format.floats
    if floats is not None:
        if floats.group_rows > 1:
            strategy: dict[str, Any] = {"strategy": "block", "block_structure": [floats.group_rows, floats.group_size]}
        elif floats.group_size:
            kind = "tensor_group" if floats.scale == "e4m3" else "group"
            dtype = "torch.float8_e4m3fn" if floats.scale == "e4m3" else "torch.uint8"
            strategy = {"strategy": kind, "group_size": floats.group_size, "scale_dtype": dtype, "zp_dtype": dtype}
        else:
            strategy = {"strategy": "channel"}
        return {"num_bits": floats.bits, "type": "float", "symmetric": True, "dynamic": False, **strategy}
    return {
        "num_bits": quant_format.bits,
        "type": "int",
        "symmetric": quant_format.symmetric,
        "strategy": "group" if quant_format.group_size else "channel",
        "group_size": quant_format.group_size or None,
        "dynamic": False,
    }


@dataclass(frozen=True)
class _Place:
    """A name in a list: from the outermost list to the last index, that index, and the rest."""

    role: tuple[str, str]
    index: int
    prefixed: bool


def _place(module: str, shared: Collection[tuple[str, str]] = ()) -> _Place | None:
    """Place of a name; in roles that several lists share it begins one part before the list."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    if not numbers or numbers[0] == 0:
        return None
    # The name from the outermost list on: the inner index alone (an expert) would not tell blocks apart.
    start, last = numbers[0] - 1, numbers[-1]
    tail = ".".join(parts[last + 1 :])
    if start > 0 and (".".join(parts[start:last]), tail) in shared:
        start -= 1
    return _Place((".".join(parts[start:last]), tail), int(parts[last]), start > 0)


def _shared_roles(modules: Iterable[str]) -> frozenset[tuple[str, str]]:
    """Roles in which two of the modules have one index, as those of an encoder and of a decoder."""
    places = Counter((place.role, place.index) for place in map(_place, modules) if place)
    return frozenset(role for (role, _), count in places.items() if count > 1)


def _bare_roles(modules: Iterable[str], shared: Collection[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """Roles that some name has without a prefix: it is optional there, so that one target serves both names."""
    places = (_place(module, shared) for module in modules)
    return frozenset(place.role for place in places if place and not place.prefixed)


def _targets(
    modules: Iterable[str], bare: Collection[tuple[str, str]], shared: Collection[tuple[str, str]]
) -> list[str]:
    """One regex per role: what surrounds the last index of a name, with the indices joined."""
    roles: dict[tuple[str, str], set[int]] = defaultdict(set)
    plain: list[str] = []
    for module in modules:
        place = _place(module, shared)
        if place is None:
            plain.append(rf"re:(.*\.)?{re.escape(module)}$")
        else:
            roles[place.role].add(place.index)
    return plain + [
        ("re:(.*\\.)?" if (head, tail) in bare else "re:.*\\.")
        + rf"{re.escape(head)}\.({'|'.join(map(str, sorted(indices)))})"
        + (rf"\.{re.escape(tail)}$" if tail else "$")
        for (head, tail), indices in roles.items()
    ]
