"""What a compressed-tensors folder holds, and which engines load it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError
from hawqtool.export.config_checks import matching_problems, module_problems, structure_problems
from hawqtool.export.embedding_table import stored_tables
from hawqtool.export.engines import TRANSFORMERS, engines
from hawqtool.export.stored.weights import PARTS, SHAPE, packed_modules, weight_shape
from hawqtool.export.verify import PLAN_FILE
from hawqtool.formats.cache import scheme_format
from hawqtool.pipeline.run.files import PLAN_SCHEMA, REPORT_SCHEMA, read_json
from hawqtool.records import LayerFormats
from hawqtool.report.schema import Engine
from hawqtool.report.wording import role


def describe_packed(index: CheckpointIndex, config: dict[str, Any]) -> dict[str, Any]:
    """Formats, stored bits, engines and recorded quality of a packed checkpoint.

    Args:
        index: Its headers.
        config: Its ``quantization_config``, of method compressed-tensors.

    Returns:
        ``supported`` is false, with the reason as ``refusal``, where not every packed layer is in a format that
        hawqtool writes.
    """
    packed = packed_modules(index)
    problems = structure_problems(config) or matching_problems(config, packed)
    formats: LayerFormats = {}
    reader = TensorReader(index)
    if not packed:
        problems = [f"format {config.get('format')!r} of compressed-tensors without packed weights is not read"]
    elif not problems:
        formats, problems = module_problems({"ignore": [], **config}, index, reader)
    if problems:
        more = f" ({len(problems)} problems)" if len(problems) > 1 else ""
        return {"supported": False, "refusal": problems[0] + more, "format": config.get("format")}
    shapes = {name: weight_shape(reader, name, formats[name]) for name in packed}
    stored = {name: sum(_bytes(index, name + part) for part in PARTS) for name in packed}
    weights = {name: math.prod(shapes[name]) for name in packed}
    sizes, table, cache = _sizes(index, weights, stored), bool(stored_tables(index)), _cache(config)
    report, note = _recorded(index.folder)
    return {
        "supported": True,
        "refusal": None,
        "parameters": sizes["parameters"],
        "format": config.get("format"),
        "bits": _by_width(formats, weights, stored),
        "roles": _roles(formats, shapes, weights, stored),
        "sizes": sizes,
        "kv_cache": cache,
        "engines": _with_trial(engines(formats, shapes, _obstacle(index.folder), table, cache), index.folder),
        "recorded": report,
        "recorded_note": note,
    }


def _cache(config: dict[str, Any]) -> str | None:
    """Format of the KV cache; None where it stays in 16 bits, `unknown` where it is none that is written here."""
    scheme = config.get("kv_cache_scheme")
    try:
        return None if scheme is None else scheme_format(scheme)
    except ValueError:
        return "unknown"


def _bytes(index: CheckpointIndex, tensor: str) -> int:
    return index.tensors[tensor].num_bytes if tensor in index.tensors else 0


def _obstacle(folder: Path) -> str | None:
    """Why transformers cannot load the folder, as the run that wrote it found."""
    try:
        recorded = read_json(folder / PLAN_FILE, PLAN_SCHEMA).get("transformers_obstacle")
    except InputError:  # written by another tool
        return None
    return recorded if isinstance(recorded, str) else None


def _with_trial(found: list[Engine], folder: Path) -> list[Engine]:
    """Verdicts with that on transformers as the run that wrote the folder found it by loading it."""
    try:
        recorded = read_json(folder / "report.json", REPORT_SCHEMA)["engines"]
        trial = next(entry for entry in recorded if entry["engine"] == TRANSFORMERS and "tried" in entry)
    except (InputError, KeyError, TypeError, StopIteration):  # no report, or a damaged one, of which the note tells
        return found
    return [trial if entry["engine"] == TRANSFORMERS else entry for entry in found]


def _by_width(formats: LayerFormats, weights: dict[str, int], stored: dict[str, int]) -> list[dict[str, Any]]:
    found = []
    for bits in sorted({fmt.bits for fmt in formats.values()}):
        names = [name for name, fmt in formats.items() if fmt.bits == bits]
        found.append(
            {
                "bits": bits,
                "linears": len(names),
                "weights": sum(weights[name] for name in names),
                "share": sum(weights[name] for name in names) / sum(weights.values()),
                "bytes": sum(stored[name] for name in names),
            }
        )
    return found


def _roles(
    formats: LayerFormats,
    shapes: dict[str, tuple[int, int]],
    weights: dict[str, int],
    stored: dict[str, int],
) -> list[dict[str, Any]]:
    members: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name in formats:
        members.setdefault((role(name), shapes[name]), []).append(name)
    return [
        {
            "role": name,
            "shape": list(shape),
            "count": len(names),
            "weights": sum(weights[n] for n in names),
            "formats": dict(sorted(Counter(formats[n].label for n in names).items())),
            "bpw": 8 * sum(stored[n] for n in names) / sum(weights[n] for n in names),
        }
        for (name, shape), names in members.items()
    ]


def _sizes(index: CheckpointIndex, weights: dict[str, int], stored: dict[str, int]) -> dict[str, Any]:
    parts = {f"{name}{part}" for name in weights for part in (*PARTS, SHAPE)}
    kept = [info for info in index.tensors.values() if info.name not in parts]
    parameters = sum(weights.values()) + sum(math.prod(info.shape) for info in kept)
    return {
        "quantized_weights": sum(weights.values()),
        "parameters": parameters,
        "stored_bytes_linears": sum(stored.values()),
        "shape_tensor_bytes": sum(_bytes(index, name + SHAPE) for name in weights),
        "unquantized_bytes": sum(info.num_bytes for info in kept),
        "bpw_linears": 8 * sum(stored.values()) / sum(weights.values()),
        "bpw_file": 8 * index.total_bytes / parameters,
    }


def _recorded(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Method and quality as report.json states them, or why they are not known."""
    path = folder / "report.json"
    if not path.is_file():
        return None, "no report.json: method and quality are not known"
    try:
        report = read_json(path, REPORT_SCHEMA)
        shipped, config = report["shipped"], report["config"]
        evaluation = report["evaluation"]
        return {
            "model": report["model"],
            "hawqtool_version": report["hawqtool_version"],
            "rounding": config["rounding"],
            "seed": config["seed"],
            "calibration": report["rows"]["calibration"],
            "shipped": shipped,
            "original_bytes": report["sizes"]["original_bytes"],
            "evaluation": None
            if evaluation is None
            else {
                "measure": evaluation["measure"],
                "original": evaluation["original"],
                "quantized": evaluation[shipped],
            },
            "in_domain": report["rows"]["report_in_domain"],
            "warnings": report["warnings"],
        }, None
    except InputError as error:
        return None, str(error)
    except (KeyError, TypeError) as error:
        return None, f"report.json is damaged ({error!r}): method and quality are not known"
