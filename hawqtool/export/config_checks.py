"""Checks of a packed checkpoint's ``quantization_config`` against the names and shapes in its headers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hawqtool.checkpoint.fusion import unit_name
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError
from hawqtool.export.compressed_tensors import (
    METHOD,
    STATUS,
    Target,
    all_targets,
    group_format,
    hits,
    is_ignored,
    matching_targets,
    module_format,
    top_format,
)
from hawqtool.export.embedding_table import TABLE_FORMAT, TABLE_GROUP, table_modules
from hawqtool.export.packed_reader import shape_problem
from hawqtool.export.stored.weights import (
    CODE_DTYPES,
    DIVISOR,
    PACKED,
    SCALE,
    ZERO_POINT,
    packed_modules,
    stored_problem,
)
from hawqtool.formats import PACK_QUANTIZED, QuantFormat
from hawqtool.parsing import short
from hawqtool.records import LayerFormats
from hawqtool.runtime.time_limit import TimeLimitError, time_limit

_TOP_KEYS = {
    *("quant_method", "format", "quantization_status", "config_groups", "ignore"),
    *("kv_cache_scheme", "global_compression_ratio"),
}
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_KEYS = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
_FLOAT_KEYS = {"block_structure", "scale_dtype", "zp_dtype"}
"""What is written; anything else, such as ``actorder`` or ``sparsity_config``, tells loaders to compute otherwise."""

MATCHING_SECONDS, SECONDS_PER_MATCH = 5.0, 2e-5
"""Most seconds that the patterns of a config may take for all names, and for each pair; usual pairs take 1e-6."""

_PARTS = (PACKED, SCALE, ".weight_shape")


def dense_matrices(index: CheckpointIndex) -> tuple[str, ...]:
    """Modules with a two-dimensional ``weight`` that is neither packed nor a table in 8 bits, in file order."""
    return tuple(
        info.name.removesuffix(".weight")
        for info in index.tensors.values()
        if info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype not in CODE_DTYPES
    )


def structure_problems(config: Any) -> list[str]:
    """Problems that keep the config from being matched at all: missing parts, wrong types, invalid regexes."""
    if not isinstance(config, dict):
        return ["config.json has no quantization_config; expected one of method compressed-tensors; write it again"]
    groups, ignore = config.get("config_groups"), config.get("ignore")
    if not isinstance(groups, dict) or not groups:
        return ["quantization_config has no config_groups; expected one group per format; write it again"]
    problems: list[str] = []
    patterns: list[str] = []
    if isinstance(ignore, list) and _is_names(ignore):
        patterns += ignore
    else:
        problems.append("quantization_config.ignore is not a list of names; expected the unquantized linears; fix it")
    for name, group in groups.items():
        if not isinstance(group, dict) or not _is_names(group.get("targets")) or not group["targets"]:
            problems.append(f"config group {name} has no list of targets; expected anchored regexes; write it again")
        elif not isinstance(group.get("weights"), dict):
            problems.append(f"config group {name} has no weights entry; expected num_bits, strategy and so on")
        else:
            patterns += group["targets"]
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:"))
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"target {pattern} is not a valid regex ({error}); fix it")
    return problems


def matching_problems(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """Whether matching takes no end, as patterns that were made for that do; one problem at most.

    Args:
        config: A config without `structure_problems`.
        modules: Names that will be matched.
    """
    patterns = [target.pattern for target in all_targets(config)] + config["ignore"]
    try:
        with time_limit(MATCHING_SECONDS + SECONDS_PER_MATCH * len(patterns) * len(modules)):
            for pattern in patterns:
                for module in modules:
                    hits(pattern, module)
    except TimeLimitError as error:
        return [f"target {short(pattern)} on {short(module)}: {error}; expected re:...$ without nested repeats; fix it"]
    return []


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Wrong values of the fixed fields, on top and in the groups."""
    problems = []
    if config.get("quant_method") != METHOD:
        problems.append(f"quant_method is {config.get('quant_method')!r}; expected {METHOD!r}; set it")
    status = config.get("quantization_status")
    if status != STATUS:
        problems.append(
            f"quantization_status is {status!r}; expected {STATUS!r}: with 'frozen' transformers loads wrong weights "
            "silently; set it"
        )
    problems += _format_problems(config)
    problems += _unknown_keys("quantization_config", config, _TOP_KEYS)
    if config.get("global_compression_ratio") is not None:
        problems.append("global_compression_ratio of quantization_config is set; expected null; remove it")
    for name, group in config["config_groups"].items():
        problems += _unknown_keys(f"config group {name}", group, _GROUP_KEYS)
        floats = group["weights"].get("type") == "float"
        problems += _unknown_keys(
            f"weights of config group {name}", group["weights"], _WEIGHT_KEYS | (_FLOAT_KEYS if floats else set())
        )
        if group.get("output_activations") is not None:
            problems.append(f"output_activations of config group {name} is set; expected null; remove it")
        try:
            group_format(group)
        except InputError as error:
            problems.append(f"config group {name}: {error}")
    return problems


def _format_problems(config: Mapping[str, Any]) -> list[str]:
    """``format`` of the config or of a group that is not that of the weights."""
    wanted = {}
    for name, group in config["config_groups"].items():
        if name == TABLE_GROUP and group.get("format") == TABLE_FORMAT:
            continue  # of which the top says nothing
        try:
            wanted[f"config group {name}"] = group_format(group).layout, group.get("format")
        except InputError:
            continue  # a problem of its own
    if wanted:
        top = top_format(layout for layout, _ in wanted.values())
        wanted = {"quantization_config": (top, config.get("format")), **wanted}
    return [
        f"format of {place} is {found!r}; expected {layout!r}; set it"
        for place, (layout, found) in wanted.items()
        if found != layout
    ]


def _unknown_keys(place: str, holder: Mapping[str, Any], known: set[str]) -> list[str]:
    """Keys with a value that hawqtool never writes there; null and empty ones say nothing."""
    odd = [key for key, value in holder.items() if key not in known and value not in (None, {}, [])]
    return [f"{place} has {key}; expected no such key, which loaders act on; remove it" for key in odd]


def target_problems(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """Targets that are not anchored, that hit nothing, or that overlap.

    Args:
        config: A config without `structure_problems`.
        modules: Packed modules and dense matrices of the checkpoint.
    """
    problems = []
    hit_tables = any(hits(t.pattern, m) for t in all_targets(config) if t.group == TABLE_GROUP for m in modules)
    for target in all_targets(config):
        hit = [module for module in modules if hits(target.pattern, module)]
        wrong = [module for module in hit if not _hits_whole(target.pattern, module)]
        where = f"target {target.pattern} of group {target.group}"
        if wrong or not (target.pattern.startswith("re:") and re.search(r"(?<!\\)\$$", target.pattern)):
            also = f"; it also hits {_worst_hit(target.pattern, wrong)}" if wrong else ""
            problems.append(f"{where} is not anchored; expected re:...$: loaders match the start only{also}; add $")
        # A table has targets by its names in transformers too, which nothing else in the folder tells.
        if not hit and not (target.group == TABLE_GROUP and hit_tables):
            problems.append(f"{where} hits no module; expected at least one packed module; remove it or fix it")
    for module in modules:
        found = matching_targets(config, module)
        if len(found) > 1:
            problems.append(
                f"{module} is hit by {_describe(found)}; expected disjoint targets: libraries pick different ones"
            )
    return problems


def module_problems(
    config: Mapping[str, Any], index: CheckpointIndex, reader: TensorReader
) -> tuple[LayerFormats, list[str]]:
    """Format of each packed module that is consistent, and the problems of the others."""
    formats: dict[str, QuantFormat] = {}
    problems = []
    for module in packed_modules(index):
        problem = _part_problem(module, index) if _is_bit_stream(module, index) else None
        if problem is None:
            try:
                quant_format = module_format(config, module)
                problem = _shape_problem(module, quant_format, index, reader)
                if problem is None:
                    formats[module] = quant_format
            except InputError as error:
                problem = str(error)
        if problem is not None:
            problems.append(problem)
    known = {*packed_modules(index), *table_modules(index)}
    for name in index.tensors:
        for suffix in (*_PARTS[1:], ZERO_POINT, DIVISOR):
            if name.endswith(suffix) and name.removesuffix(suffix) not in known:
                problems.append(f"{name} has no {name.removesuffix(suffix)}{PACKED} beside it; write it again")
    return formats, problems


def ignore_problems(config: Mapping[str, Any], index: CheckpointIndex, other_linears: Iterable[str]) -> list[str]:
    """Unquantized linears that are missing from ``ignore`` or hit by a target, and entries that name none of them."""
    packed = {*packed_modules(index), *table_modules(index)}
    dense = dense_matrices(index)
    linears = dict.fromkeys(other_linears) | dict.fromkeys(m for m in dense if m.rpartition(".")[2] == "lm_head")
    problems = []
    for module in dict.fromkeys([*linears, *dense]):
        if module in packed or is_ignored(config, module):
            continue
        if module in linears:
            problems.append(f"unquantized linear {module} is not in ignore; some engines refuse it; add it to ignore")
        elif matching_targets(config, module):
            found = _describe(matching_targets(config, module))
            problems.append(f"{module}.weight is not packed but hit by {found}; loaders expect it packed; fix that")
    known = {*linears, *dense, *packed}
    unknown = [entry for entry in config["ignore"] if not any(hits(entry, module) for module in known)]
    return problems + [f"ignore names {entry}, which is no unquantized linear; remove it" for entry in unknown]


def fused_problems(formats: LayerFormats, index: CheckpointIndex, units: Mapping[str, str]) -> list[str]:
    """Fused sets whose members differ in format, or that are packed in part.

    Args:
        formats: Format of each packed module.
        index: Headers of the checkpoint.
        units: Units of the plan by module; those that it does not name are in the sets that engines fuse.
    """
    sets: dict[str, list[str]] = defaultdict(list)
    modules = dict.fromkeys((*packed_modules(index), *dense_matrices(index)))
    for module in modules:
        unit = units.get(module, unit_name(module, modules))
        if unit != module:
            sets[unit].append(module)
    packed = set(packed_modules(index))
    problems = []
    for unit, members in sets.items():
        labels = {m: formats[m].label if m in formats else "unknown" if m in packed else "unpacked" for m in members}
        if len(set(labels.values()) - {"unknown"}) > 1:
            found = ", ".join(f"{module} {label}" for module, label in labels.items())
            problems.append(f"fused set {unit} mixes formats ({found}); engines need one format for all of it")
    return problems


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _hits_whole(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    return pattern == module


def _worst_hit(pattern: str, modules: Sequence[str]) -> str:
    """Of modules that are hit in part, one whose hit ends inside a path component, such as 1 in 10, if any."""
    for module in modules:
        match = re.match(pattern.removeprefix("re:"), module)
        if match and module[match.end() : match.end() + 1] not in (".", ""):
            return module
    return modules[0]


def _describe(targets: Iterable[Target]) -> str:
    return " and ".join(f"{target.pattern} of group {target.group}" for target in targets)


def _part_problem(module: str, index: CheckpointIndex) -> str | None:
    expected = dict(zip(_PARTS, (("I32",), ("BF16", "F16", "F32"), ("I64",)), strict=True))
    for suffix, dtypes in expected.items():
        info = index.tensors.get(module + suffix)
        if info is None:
            return f"{module}{suffix} is missing; expected it beside {module}{PACKED}; write it again"
        if info.dtype not in dtypes:
            return f"{info.name} is {info.dtype}; expected {' or '.join(dtypes)}; write it again"
    zeros = index.tensors.get(module + ZERO_POINT)
    if zeros is not None and zeros.dtype != "I32":
        return f"{zeros.name} is {zeros.dtype}; expected I32, packed along the rows; write it again"
    if index.tensors[f"{module}.weight_shape"].shape != (2,):
        return f"{module}.weight_shape does not hold two numbers; expected rows and columns; write it again"
    if f"{module}.weight" in index.tensors:
        return f"{module}.weight is stored beside {module}{PACKED}; expected one of them; write it again"
    return None


def _is_bit_stream(module: str, index: CheckpointIndex) -> bool:
    """Whether codes are dense bit streams of integers, or would be if they were not damaged."""
    codes = index.tensors.get(module + PACKED)
    return codes is not None and codes.dtype != "U8"


def _shape_problem(module: str, quant_format: QuantFormat, index: CheckpointIndex, reader: TensorReader) -> str | None:
    if quant_format.layout != PACK_QUANTIZED:
        return stored_problem(module, quant_format, index)
    if not _is_bit_stream(module, index):
        return f"{module} is not stored as the bit stream of {quant_format.label}, its config group; write it again"
    rows, columns = (int(value) for value in reader.tensor(f"{module}.weight_shape"))
    infos = {suffix: index.tensors.get(module + suffix) for suffix in (PACKED, SCALE, ZERO_POINT)}
    found = {suffix: info.shape for suffix, info in infos.items() if info is not None}
    return shape_problem(module, quant_format, found, (rows, columns))
