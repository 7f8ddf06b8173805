"""What a checkpoint is, from its headers and configuration alone (schema ``hawqtool.inspect/1``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats, unit_group_size
from hawqtool.checkpoint.gguf.header import is_gguf
from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo, read_index
from hawqtool.checkpoint.originals.recognition import read_original
from hawqtool.checkpoint.source import locate
from hawqtool.config import load_config
from hawqtool.errors import HawqError, InputError, UsageError
from hawqtool.export.compressed_tensors import METHOD
from hawqtool.export.packed_reader import read_config
from hawqtool.formats import CHANNEL, GROUP_SIZES, QuantFormat
from hawqtool.pipeline.inspection.gguf import describe_gguf
from hawqtool.pipeline.inspection.packed import describe_packed
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import BlockSpec, LinearSpec, Unit
from hawqtool.report.wording import role, starred

INSPECT_SCHEMA = "hawqtool.inspect/1"
SHOWN_WIDTHS = (2, 3, 4, 8)


def run_inspect(model: str) -> dict[str, Any]:
    """``hawqtool inspect``: describe an original or a quantized checkpoint, a folder, a hub id or a GGUF file.

    Returns:
        ``kind`` is ``original``, ``quantized`` (written by hawqtool or in the same format), ``other`` or ``gguf`` (see
        `describe_gguf`); where ``supported`` is false, ``refusal`` says why and the rest is what the headers tell.

    Raises:
        InputError: If it is no checkpoint at all.
    """
    if is_gguf(Path(model)):
        return describe_gguf(Path(model))
    folder = locate(model).folder
    index = read_index(folder)
    config = read_config(folder)
    described = _describe(index, config.get("quantization_config"))
    if not described["supported"]:
        described["matrices"] = _matrices(index.tensors.values())
    return _header_facts(index, config) | described


def _header_facts(index: CheckpointIndex, config: dict[str, Any]) -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for info in index.tensors.values():
        entry = dtypes.setdefault(info.dtype, {"tensors": 0, "elements": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["elements"] += math.prod(info.shape)
        entry["bytes"] += info.num_bytes
    return {
        "schema": INSPECT_SCHEMA,
        "model": index.folder.absolute().name,
        "architectures": config.get("architectures"),
        "model_type": config.get("model_type"),
        "bytes": index.total_bytes,
        "files": len(index.files),
        "tensors": len(index.tensors),
        "elements": sum(entry["elements"] for entry in dtypes.values()),
        "dtypes": dtypes,
    }


def _describe(index: CheckpointIndex, quantization: Any) -> dict[str, Any]:
    """The checkpoint as a quantized one in our format, else as an original, which may be quantized itself."""
    packed = None
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        packed = {"kind": "quantized", "method": METHOD} | describe_packed(index, quantization)
    try:
        source_format = read_original(index.folder).source_format
    except InputError as error:
        if packed is None and quantization is None:
            return {"kind": "original", "source_format": None, "supported": False, "refusal": str(error)}
        return packed or _describe_other(quantization, str(error))
    if packed is not None and packed["supported"]:
        return packed | {"source_format": source_format}
    return {"kind": "original", "source_format": source_format} | _describe_original(index)


def _describe_other(quantization: Any, refusal: str) -> dict[str, Any]:
    known = quantization if isinstance(quantization, dict) else {}
    method = known.get("quant_method")
    return {"kind": "other", "method": method, "supported": False, "refusal": refusal}


def _describe_original(index: CheckpointIndex) -> dict[str, Any]:
    try:
        # Whole rows divide every layer: with a group size some models would be refused for the setting alone.
        return _describe_job(
            prepare(
                load_config(
                    None, {"model": str(index.folder), "device": "cpu", "group_size": "channel", "rotate": "off"}
                )
            )
        )
    except HawqError as error:
        return {"supported": False, "refusal": str(error)}


def _describe_job(job: Job) -> dict[str, Any]:
    total = sum(math.prod(info.shape) for info in job.index.tensors.values())
    return {
        "supported": True,
        "refusal": None,
        "parameters": total,
        "blocks": len(job.structure.blocks),
        "quantizable_weights": sum(unit.num_weights for unit in job.units),
        "roles": _roles(job.structure.linears.values(), total),
        "units": _units(job.units),
        "input_groups": _input_groups(job.structure.blocks),
        "uniform": _uniform_sizes(job),
        "unquantized": _unquantized(job),
    }


def _matrices(tensors: Iterable[TensorInfo]) -> list[dict[str, Any]]:
    """Tensors of two or more dimensions by name, numbers in it replaced by stars, and shape."""
    infos = list(tensors)
    total = sum(math.prod(info.shape) for info in infos) or 1
    counts = Counter((starred(info.name), info.shape, info.dtype) for info in infos if len(info.shape) > 1)
    return [
        {
            "name": name,
            "dtype": dtype,
            "shape": list(shape),
            "count": count,
            "elements": count * math.prod(shape),
            "share": count * math.prod(shape) / total,
        }
        for (name, shape, dtype), count in counts.items()
    ]


def _roles(linears: Iterable[LinearSpec], total: int) -> list[dict[str, Any]]:
    """Linears of one role and shape, with the group sizes that divide them."""
    members: dict[tuple[str, int, int], list[LinearSpec]] = {}
    for spec in linears:
        members.setdefault((role(spec.name), spec.out_features, spec.in_features), []).append(spec)
    return [
        {
            "role": name,
            "shape": [rows, columns],
            "count": len(specs),
            "weights": len(specs) * specs[0].num_weights,
            "share": len(specs) * specs[0].num_weights / total,
            "group_sizes": [
                size for size in GROUP_SIZES if unit_group_size(Unit(specs[0].unit, (specs[0],)), size) == size
            ],
        }
        for (name, rows, columns), specs in members.items()
    ]


def _counted(names: Iterable[str]) -> list[str]:
    """Names in order, those that occur more than once with how often."""
    return [f"{name} x{count}" if count > 1 else name for name, count in Counter(names).items()]


def _units(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Allocation units by what they consist of; a unit is what engines fuse and gets one format."""
    counts = Counter((role(unit.name), tuple(_counted(role(m.name) for m in unit.members))) for unit in units)
    return [{"unit": name, "members": list(members), "count": count} for (name, members), count in counts.items()]


def _input_groups(blocks: Iterable[BlockSpec]) -> list[dict[str, Any]]:
    """Patterns of input groups: which linears of a block see one input, and how many blocks are alike."""
    patterns = Counter(
        tuple(Counter(tuple(_counted(role(spec.name) for spec in group)) for group in block.input_groups).items())
        for block in blocks
    )
    return [
        {"groups": [{"members": list(members), "count": count} for members, count in groups], "blocks": blocks_alike}
        for groups, blocks_alike in patterns.items()
    ]


def _uniform_sizes(job: Job) -> list[dict[str, Any]]:
    """Exact files of uniform plans; group sizes that do not fit, or equal a smaller one for all layers, are left out.

    Where no group size fits, whole rows are shown.
    """
    weights = sum(unit.num_weights for unit in job.units)
    sizes = []
    seen: set[tuple[QuantFormat, ...]] = set()
    for bits in SHOWN_WIDTHS:
        fitting = [size for size in sorted(GROUP_SIZES) if _fits(job.units, size)]
        for size in fitting or [CHANNEL]:
            formats = uniform_formats(job.units, bits, size)
            if tuple(formats.values()) in seen:
                continue
            seen.add(tuple(formats.values()))
            sizes.append(
                {
                    "format": QuantFormat(bits, size).label,
                    "bytes": job.layout(formats).total_bytes,
                    "bpw_linears": 8 * stored_bytes(job.units, formats) / weights,
                    "units_in_smaller_groups": sum(fmt.group_size < size for fmt in formats.values()),
                }
            )
    return sizes


def _fits(units: Iterable[Unit], size: int) -> bool:
    try:
        uniform_formats(tuple(units), SHOWN_WIDTHS[0], size)
    except UsageError:
        return False
    return True


def _unquantized(job: Job) -> dict[str, int]:
    """Bytes of what stays as it is, by kind."""
    from torch import nn

    head = job.skeleton.get_output_embeddings()
    embeddings = {name for name, module in job.skeleton.named_modules() if isinstance(module, nn.Embedding)}
    heads = {name for name, module in job.skeleton.named_modules() if module is head}
    packed = {member.name for unit in job.units for member in unit.members}
    sizes = dict.fromkeys(("embeddings", "head", "other linears", "norms and biases", "other tensors"), 0)
    for info in job.index.tensors.values():
        module = info.name.rpartition(".")[0]
        if info.name.endswith(".weight") and module in packed:
            continue
        if _is_one_of(module, embeddings):
            kind = "embeddings"
        elif _is_one_of(module, heads):
            kind = "head"
        elif len(info.shape) < 2:
            kind = "norms and biases"
        else:
            kind = "other linears" if _is_one_of(module, set(job.unquantized_linears)) else "other tensors"
        sizes[kind] += info.num_bytes
    return {kind: size for kind, size in sizes.items() if size}


def _is_one_of(stored: str, modules: set[str]) -> bool:
    """Whether a stored name is one of these modules; checkpoints of base models lack the prefix, or have another."""
    return any(f".{stored}".endswith(f".{name}") or f".{name}".endswith(f".{stored}") for name in modules)
