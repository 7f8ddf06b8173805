"""Reopen a written checkpoint and check everything that loaders rely on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hawqtool.checkpoint.fusion import unit_name
from hawqtool.checkpoint.index import CheckpointIndex, ExpertStack, read_index
from hawqtool.checkpoint.originals.declaration import without_quantization
from hawqtool.checkpoint.originals.recognition import read_original
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.checkpoint.rotated.hadamard import KIND, VERSION
from hawqtool.checkpoint.stacked_experts import split_stacked
from hawqtool.errors import InputError
from hawqtool.export.config_checks import (
    dense_matrices,
    field_problems,
    fused_problems,
    ignore_problems,
    matching_problems,
    module_problems,
    structure_problems,
    target_problems,
)
from hawqtool.export.embedding_table import table_modules
from hawqtool.export.manifest import MANIFEST_FILE, REPORT_FILE, is_manifest, manifest_problems, source_file_problems
from hawqtool.export.packed_reader import read_config
from hawqtool.export.stored.cache import cache_problems, is_cache_record
from hawqtool.export.stored.weights import packed_modules
from hawqtool.export.tensor_checks import (
    checksum_problems,
    copy_problems,
    divisor_problems,
    error_problems,
    plan_problems,
    scale_problems,
    zero_point_problems,
)
from hawqtool.export.writer import UNTIED
from hawqtool.formats import parse_label
from hawqtool.model.rotation.fold import rotated_source
from hawqtool.parsing import MAX_RECORD_BYTES, MAX_RECORD_VALUES, ParseError, load_json, shown
from hawqtool.records import LayerFormats
from hawqtool.runtime.background import beside

PLAN_FILE = "reproduce/plan.json"
CHECKSUM_FILE = "reproduce/checksums.json"

Check = Callable[[], list[str]]
"""Gives problems, one line each."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_folder` found.

    Args:
        problems: One line each, naming the tensor, target or module; empty for a good checkpoint.
        num_tensors: Stored tensors.
        num_packed: Packed modules.
        total_bytes: Sum of the safetensors files.
    """

    problems: tuple[str, ...]
    num_tensors: int
    num_packed: int
    total_bytes: int


def verify_folder(
    folder: Path, against: Path | None = None, device: torch.device | str = "cpu", sealed: bool = True
) -> VerifyReport:
    """Check a packed checkpoint: files, config, names, shapes, scales, zeros, checksums, plan, optionally the source.

    Args:
        folder: A written checkpoint.
        against: Folder of the original model; then copied files and unquantized tensors must be byte-equal to it and
            packed ones must approximate it as recorded.
        device: Where that is computed.
        sealed: Whether the folder has its manifest and its report, which are written last.

    Raises:
        InputError: If one of the folders or a file's header cannot be read at all, or hawqtool did not write it.
    """
    folder = Path(folder)
    index = read_index(folder)
    reader = TensorReader(index)
    model_config = read_config(folder)
    packed = _packed_layers(folder, index)
    plan, problems = _record(folder, PLAN_FILE, _is_plan)
    layers = plan["layers"] if plan else []
    checksums, found = _record(folder, CHECKSUM_FILE, _is_checksums)
    problems += found
    if sealed:
        manifest, found = _record(folder, MANIFEST_FILE, is_manifest)
        problems += found
        if manifest:
            problems += manifest_problems(folder, index, manifest, hash_all=checksums is None)
        problems += _learned_problems(folder, (checksums or {}).get("changed", []))
    if not packed:
        problems.append(f"{folder} has no packed module; expected weights with a weight_scale; pass an output folder")
    config: Any = model_config.get("quantization_config")
    matched = (*packed, *dense_matrices(index), *table_modules(index))
    broken = structure_problems(config) or matching_problems(config, matched)
    problems += broken
    formats: LayerFormats = {}
    if not broken:
        problems += field_problems(config)
        aliases = [layer["module"] for layer in layers if "module" in layer]
        problems += target_problems(config, (*matched, *aliases))
        formats, found = module_problems(config, index, reader)
        problems += found + ignore_problems(config, index, plan["other_linears"] if plan else ())
        problems += cache_problems(config, reader, plan.get("kv_cache") if plan else None)
    units = {layer["name"]: layer["unit"] for layer in layers if "unit" in layer}
    problems += fused_problems(formats, index, units)
    problems += _part_problems(reader, formats, units)
    aside, checks = _aside(device), list[Check]()
    if checksums:
        checks.append(aside(partial(checksum_problems, reader, index, checksums["tensors"])))
    if plan:
        checks.append(partial(plan_problems, formats, index, plan))
    if against is not None:
        source = TensorReader(_source_index(Path(against), plan), device=torch.device(device))
        source_config = read_config(Path(against)) | ({} if _seed(plan) is None else {UNTIED: False})
        checks.append(partial(_model_config_problems, model_config, source_config))
        checks.append(partial(source_file_problems, folder, Path(against), index))
        checks += map(aside, _weight_checks(reader, source, formats, layers, checksums or {}, device))
    problems += [problem for check in checks for problem in check()]
    return VerifyReport(tuple(problems), len(index.tensors), len(packed), index.total_bytes)


def _aside(device: torch.device | str) -> Callable[[Check], Check]:
    """What begins checks that read gigabytes: beside each other where there is a GPU, else when they are asked for.

    At its end each has the largest tensors alone, for which a host with a GPU has cores left over.
    """
    return beside if torch.device(device).type == "cuda" else lambda check: check


def _packed_layers(folder: Path, index: CheckpointIndex) -> tuple[str, ...]:
    """Packed modules of a folder that hawqtool wrote; of another one single problems would say little."""
    packed = tuple(packed_modules(index))
    if not packed and not any((folder / record).exists() for record in (PLAN_FILE, CHECKSUM_FILE)):
        raise InputError(
            f"{folder} has neither a packed layer nor {PLAN_FILE}; expected a folder that hawqtool quantize wrote"
        )
    return packed


def _part_problems(reader: TensorReader, formats: LayerFormats, units: dict[str, str]) -> list[str]:
    """Of scales, divisors and zero points; fused sets are those of the plan, else of the names."""
    sets = {name: unit_name(name, formats) for name in formats} | units
    problems = scale_problems(reader, tuple(formats)) + divisor_problems(reader, formats, sets)
    return problems + zero_point_problems(reader, formats)


def _source_index(against: Path, plan: dict[str, Any] | None) -> CheckpointIndex:
    """Index of the source, with stacked experts split as the plan says, and rotated by the seed that it names.

    What reads and writes the residual stream is found anew.
    """
    records = plan.get("stacked_experts", {}) if plan else {}
    stacks = {name: ExpertStack(**record | {"linears": tuple(record["linears"])}) for name, record in records.items()}
    index, seed = split_stacked(read_original(against), stacks), _seed(plan)
    return index if seed is None else rotated_source(against, index, seed)


def rotation_seed(folder: Path) -> int | None:
    """Seed of the rotation that a written folder records; None where there is none.

    Raises:
        InputError: If the record is of a kind or a version that is not known here.
    """
    return _seed(_record(folder, PLAN_FILE, _is_plan)[0])


def _seed(plan: Mapping[str, Any] | None) -> int | None:
    found = (plan or {}).get("rotation")
    if found is None:
        return None
    known = isinstance(found, dict) and (found.get("kind"), found.get("version")) == (KIND, VERSION)
    if not known or type(found.get("seed")) is not int:
        raise InputError(
            f"{PLAN_FILE} names rotation {shown(found)}; expected kind {KIND} of version {VERSION} with a seed; use "
            "the version of hawqtool that wrote it"
        )
    return int(found["seed"])


def origin_problems(folder: Path, against: Path, device: torch.device | str = "cpu") -> list[str]:
    """Weights of a packed folder that cannot come from a model: copies that differ, codes that do not approximate it.

    Args:
        folder: A packed checkpoint; one without checksums, of another tool, is judged by its copies alone.
        against: Folder of the model.
        device: Where that is computed.

    Raises:
        InputError: If one of the folders or a file's header cannot be read at all.
    """
    index = read_index(folder)
    plan, _ = _record(folder, PLAN_FILE, _is_plan)
    reader = TensorReader(index)
    source = TensorReader(_source_index(against, plan), device=torch.device(device))
    config: Any = read_config(folder).get("quantization_config")
    if broken := structure_problems({"ignore": [], **config} if isinstance(config, dict) else config):
        return broken
    checksums, _ = _record(folder, CHECKSUM_FILE, _is_checksums)
    if checksums is None:
        return copy_problems(reader, source, ())
    formats, problems = module_problems({"ignore": [], **config}, index, reader)
    checks = _weight_checks(reader, source, formats, plan["layers"] if plan else [], checksums, device)
    return problems + [problem for check in checks for problem in check()]


def _weight_checks(
    reader: TensorReader,
    source: TensorReader,
    formats: LayerFormats,
    layers: list[dict[str, Any]],
    checksums: dict[str, Any],
    device: torch.device | str,
) -> list[Check]:
    """What finds differences to the source that rounding does not explain."""
    transposed = {layer["name"] for layer in layers if layer.get("transposed")}
    recorded = checksums.get("weight_error", {})
    return [
        partial(copy_problems, reader, source, checksums.get("changed", [])),
        partial(error_problems, reader, source, formats, recorded, transposed, torch.device(device)),
    ]


def _model_config_problems(config: dict[str, Any], source: dict[str, Any]) -> list[str]:
    config, source = without_quantization(config), without_quantization(source)
    keys = sorted(set(config) | set(source))
    return [
        f"config.json has {key} {config.get(key)!r}; the source has {source.get(key)!r}; expected equal; restore it"
        for key in keys
        if _text(config.get(key)) != _text(source.get(key))
    ]


def _text(value: Any) -> str:
    """A value of JSON as text: NaN, which Python's JSON knows, is equal to itself there."""
    return json.dumps(value, sort_keys=True)


def _learned_problems(folder: Path, changed: list[str]) -> list[str]:
    """Learned norm gains in a folder whose report tells of no training."""
    try:
        report = load_json(folder / REPORT_FILE, MAX_RECORD_BYTES, MAX_RECORD_VALUES)
    except ParseError:
        return []  # a problem of the manifest
    config = report.get("config") if isinstance(report, dict) else None
    steps = config if isinstance(config, dict) else {}
    if not changed or steps.get("refine_steps") or steps.get("distill_steps"):
        return []
    return [f"tensor {changed[0]} is recorded as learned, but {REPORT_FILE} has no training steps; write it again"]


def _record(folder: Path, name: str, is_valid: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """A file of ``reproduce/``, or what is wrong with it."""
    path = folder / name
    if not path.is_file():
        return None, [f"{name} is missing; expected it beside the weights; write the checkpoint again"]
    try:
        content = load_json(path)
    except ParseError as error:
        return None, [f"{name} is not readable JSON ({error}); write the checkpoint again"]
    if not is_valid(content):
        return None, [f"{name} does not have the expected fields; write the checkpoint again"]
    return content, []


def _is_plan(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("total_bytes"), int):
        return False
    layers, others = content.get("layers"), content.get("other_linears")
    if not _are_stacks(content.get("stacked_experts", {})) or not is_cache_record(content.get("kv_cache")):
        return False
    if not isinstance(layers, list) or not isinstance(others, list) or not all(isinstance(o, str) for o in others):
        return False
    return all(
        isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and isinstance(layer.get("unit", ""), str)
        and isinstance(layer.get("module", ""), str)
        and isinstance(layer.get("bits"), int)
        and (isinstance(layer.get("group_size"), int) or layer.get("group_size") == "channel")
        and isinstance(layer.get("symmetric"), bool)
        and _is_label(layer.get("format", "w4ch"))
        and isinstance(layer.get("bytes"), int)
        for layer in layers
    )


def _is_label(text: Any) -> bool:
    """Whether it is the label of a format."""
    try:
        parse_label(text)
    except (TypeError, ValueError, AttributeError):
        return False
    return True


def _are_stacks(content: Any) -> bool:
    """Whether an entry of a plan describes tensors of stacked experts."""
    fields = {"experts": str, "linears": list, "transposed": bool, "concatenated": bool, "leaf": str}
    return isinstance(content, dict) and all(
        isinstance(record, dict)
        and record.keys() == fields.keys()
        and all(isinstance(record[name], kind) for name, kind in fields.items())
        and record["linears"]
        and all(isinstance(linear, str) for linear in record["linears"])
        and record["leaf"] in ("weight", "bias")
        for record in content.values()
    )


def _is_checksums(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        return False
    errors, changed = content.get("weight_error", {}), content.get("changed", [])
    if not isinstance(changed, list) or not all(isinstance(name, str) for name in changed):
        return False
    return isinstance(errors, dict) and all(isinstance(value, (int, float)) for value in errors.values())
