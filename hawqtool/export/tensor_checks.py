"""Checks of a packed checkpoint's bytes: scales, zero points, checksums, the plan, and the source."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo
from hawqtool.checkpoint.packing import pack_zeros, unpack_zeros
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.export.embedding_table import EmbeddingTable, stored_tables, table_tensors
from hawqtool.export.packed_reader import packed_errors
from hawqtool.export.plausibility import (
    error_bound_problems,
    gain_problems,
    multiple_problems,
)
from hawqtool.export.stored.cache import cache_names
from hawqtool.export.stored.weights import (
    DIVISOR,
    INPUT_DIVISOR,
    PARTS,
    SCALE,
    SHAPE,
    ZERO_POINT,
    packed_modules,
    packed_parts,
    weight_shape,
)
from hawqtool.formats import CHANNEL, UNQUANTIZED, QuantFormat, parse_label
from hawqtool.records import LayerFormats

_THREADS = 8
"""Tensors that are checked at a time: each is hashed at 0.9 GB/s. Each worker may hold a weight of the source."""

T = TypeVar("T")

_GAIN_NAME = re.compile(r"(^|\.)([^.]*norm[^.]*|ln[^.]*)\.weight$", re.IGNORECASE)

ERROR_TOLERANCE = 1e-4
"""Relative difference allowed between the recorded and the measured weight error (order of summation)."""


def _all_problems(check: Callable[[T], list[str]], items: Iterable[T]) -> list[str]:
    """Problems of all items in their order; reading, hashing and arithmetic go on beside each other in threads."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "verify") as pool:
        return [problem for found in pool.map(check, items) for problem in found]


def is_gain(name: str) -> bool:
    """Whether a tensor is a norm's gain by its name; what may be learned beside packed weights."""
    return _GAIN_NAME.search(name) is not None


def scale_problems(reader: TensorReader, modules: Sequence[str]) -> list[str]:
    """Scales that are zero or not finite, first of each module."""
    problems = []
    for module in modules:
        scales = reader.tensor(f"{module}{SCALE}")
        # Exponents as bytes: 255 is no number, and 0 a scale.
        scales = scales.float() if scales.dtype != torch.uint8 else torch.where(scales == 255, torch.nan, 1.0)
        bad = (~torch.isfinite(scales) | (scales == 0)).nonzero()
        if len(bad):
            row, group = bad[0].tolist()
            problems.append(
                f"{module}.weight_scale has {float(scales[row, group])} at row {row}, group {group} "
                f"({len(bad)} such); expected finite and non-zero; write it again"
            )
    return problems


def divisor_problems(reader: TensorReader, formats: LayerFormats, units: Mapping[str, str]) -> list[str]:
    """Divisors of E4M3 scales, of weights and of inputs, that are no positive numbers, or differ inside a fused set.

    Args:
        reader: The packed folder.
        formats: Formats of the consistent packed modules.
        units: Fused set by module; a module that it does not name is alone.
    """
    problems, seen = list[str](), dict[tuple[str, str], tuple[str, float]]()
    for module, suffix in ((m, s) for m in formats for s in (DIVISOR, INPUT_DIVISOR) if m + s in reader):
        divisor = float(reader.tensor(module + suffix))
        if not (math.isfinite(divisor) and divisor > 0):
            problems.append(f"{module}{suffix} is {divisor}; expected a positive number; write it again")
        first, other = seen.setdefault((units.get(module, module), suffix), (module, divisor))
        if divisor != other:
            problems.append(
                f"{module}{suffix} is {divisor}, that of {first} {other}; expected equal ones: engines take one for "
                "all that they fuse, and the others would be wrong; write it again"
            )
    return problems


def zero_point_problems(reader: TensorReader, formats: LayerFormats) -> list[str]:
    """Zero points with bits set behind the last row, which no zero point in range leaves there."""
    problems = []
    for module, quant_format in formats.items():
        if quant_format.symmetric:
            continue
        stored = reader.tensor(f"{module}{ZERO_POINT}")
        rows = int(reader.tensor(module + SHAPE)[0])
        if not torch.equal(pack_zeros(unpack_zeros(stored, quant_format.bits, rows), quant_format.bits), stored):
            problems.append(
                f"{module}{ZERO_POINT} has bits set behind its {rows} zero points of {quant_format.bits} bits; "
                "expected zeros there; write it again"
            )
    return problems


def checksum_problems(reader: TensorReader, index: CheckpointIndex, expected: Mapping[str, Any]) -> list[str]:
    """Tensors whose SHA-256 differs from the recorded one, or that only one side has."""

    def check(name: str) -> list[str]:
        if name not in expected:
            return [f"tensor {name} is not in reproduce/checksums.json; expected every tensor; write it again"]
        digest = hashlib.sha256()
        for piece in reader.chunks(name):
            digest.update(piece)
        if digest.hexdigest() == expected[name]:
            return []
        return [f"tensor {name} differs from its SHA-256 in reproduce/checksums.json; it changed on disk"]

    problems = _all_problems(check, index.tensors)
    missing = [name for name in expected if name not in index.tensors]
    return problems + [f"tensor {name} of reproduce/checksums.json is missing; write it again" for name in missing]


def plan_problems(formats: LayerFormats, index: CheckpointIndex, plan: Mapping[str, Any]) -> list[str]:
    """Differences between the files and ``reproduce/plan.json``: modules, formats, stored bytes, file sizes.

    Args:
        formats: Formats found in the folder; modules with other problems are absent.
        index: Index of the folder.
        plan: Content of the file; ``group_size`` is a number or ``channel``.
    """
    problems = []
    packed = set(packed_modules(index))
    kept = {layer["name"]: layer for layer in plan["layers"] if layer.get("format") == UNQUANTIZED}
    planned = {layer["name"]: layer for layer in plan["layers"] if layer["name"] not in kept}
    for name, layer in kept.items():
        info = index.tensors.get(f"{name}.weight")
        if info is None or name in packed or info.num_bytes != layer["bytes"]:
            problems.append(f"{name} stays as it is by the plan; expected its weight of {layer['bytes']} bytes")
    for name, layer in planned.items():
        if name not in packed:
            problems.append(f"{name} is in reproduce/plan.json but not packed; expected it packed; write it again")
            continue
        parts = [name + suffix for suffix in PARTS]
        stored = sum(index.tensors[part].num_bytes for part in parts if part in index.tensors)
        if stored != layer["bytes"]:
            problems.append(f"{name} takes {stored} bytes; reproduce/plan.json says {layer['bytes']}; write it again")
        group_size = CHANNEL if layer["group_size"] == "channel" else layer["group_size"]
        plain = QuantFormat(layer["bits"], group_size, layer["symmetric"])
        wanted = parse_label(layer["format"]) if "format" in layer else plain
        if name in formats and formats[name] != wanted:
            problems.append(f"{name} is {formats[name].label}; reproduce/plan.json says {wanted.label}; write it again")
    unplanned = sorted(packed - set(planned))
    problems += [f"{name} is packed but not in reproduce/plan.json; write it again" for name in unplanned]
    if index.total_bytes != plan["total_bytes"]:
        problems.append(
            f"the safetensors files take {index.total_bytes} bytes; reproduce/plan.json says {plan['total_bytes']}; "
            "write it again"
        )
    return problems


def copy_problems(reader: TensorReader, source: TensorReader, changed: Collection[str]) -> list[str]:
    """Unquantized tensors that are missing, unknown to the source, or not byte-equal to it.

    Args:
        reader: The packed folder.
        source: The original.
        changed: Norm gains that were learned: finite tensors near the source's; nothing else may be among them.
    """
    index, packed, tables = reader.index, set(packed_modules(reader.index)), stored_tables(reader.index)

    def check(name: str) -> list[str]:
        info, found = source.index.tensors[name], index.tensors.get(name)
        if name in tables:
            return _table_problems(reader, source, tables[name])
        if found is None:
            return [f"tensor {name} of the source is missing; expected a copy; write it again"]
        if _kind(found) != _kind(info):
            return [f"tensor {name} is {_kind(found)}; the source has {_kind(info)}; write it again"]
        if name in changed:
            return _gain_problems(reader, source, name)
        if any(a != b for a, b in zip(reader.chunks(name), source.chunks(name), strict=True)):
            return [f"tensor {name} differs from the source's; expected equal bytes; write it again"]
        return []

    scaled = set(cache_names(index))  # scales of a KV cache have checks of their own
    quantized = {f"{module}.weight" for module in packed}
    copied = (n for n in source.index.tensors if n not in scaled | quantized)
    problems = _all_problems(check, copied)
    parts = {f"{module}{suffix}" for module in packed for suffix in (*PARTS, SHAPE)}
    parts |= {scale for table in tables.values() for scale in table.scales}
    known = parts | set(source.index.tensors) | scaled
    unknown = [name for name in index.tensors if name not in known]
    return problems + [
        f"tensor {name} is not in the source; expected no new tensor; write it again" for name in unknown
    ]


def _table_problems(reader: TensorReader, source: TensorReader, table: EmbeddingTable) -> list[str]:
    """Tensors of an embedding in 8 bits that are not what rounding the source's gives."""
    expected = table_tensors(table, source.tensor(table.tensor).cpu())
    wrong = [name for name, tensor in expected.items() if not torch.equal(reader.tensor(name), tensor)]
    return [f"tensor {name} is not the source's embedding rounded to 8 bits; write it again" for name in wrong]


def _gain_problems(reader: TensorReader, source: TensorReader, name: str) -> list[str]:
    if not is_gain(name):
        return [f"tensor {name} is recorded as changed; expected norm gains alone to be; write it again"]
    gain = reader.tensor(name)
    if not bool(torch.isfinite(gain).all()):
        return [f"tensor {name} holds NaN or Inf; expected finite gains; write it again"]
    return gain_problems(name, gain, source.tensor(name).cpu())


def error_problems(
    reader: TensorReader,
    source: TensorReader,
    formats: LayerFormats,
    recorded: Mapping[str, Any],
    transposed: Collection[str],
    device: torch.device,
) -> list[str]:
    """Packed modules that do not approximate the source's weight as recorded, or as rounding cannot.

    Args:
        reader: The packed folder.
        source: The original.
        formats: Formats of the consistent packed modules.
        recorded: Relative squared weight error by module.
        transposed: Modules whose weight the source stores as ``[in, out]``.
        device: Where weights are compared.
    """
    check = partial(_error_problems, reader, source, formats, recorded, transposed, device)
    return _all_problems(check, formats)


def _error_problems(
    reader: TensorReader,
    source: TensorReader,
    formats: LayerFormats,
    recorded: Mapping[str, Any],
    transposed: Collection[str],
    device: torch.device,
    module: str,
) -> list[str]:
    """Those of one module."""
    name, quant_format = f"{module}.weight", formats[module]
    rows, columns = weight_shape(reader, module, quant_format)
    if name not in source:
        return [f"{module} is packed but {name} is not in the source; expected the same model"]
    found = list(source.info(name).shape)
    if found != ([columns, rows] if module in transposed else [rows, columns]):
        return [f"{module}{SHAPE} is {[rows, columns]}; the source's weight has {found}"]
    stored = source.tensor(name).cpu()
    weight = stored.t() if module in transposed else stored
    found_errors = packed_errors(weight, packed_parts(reader, module), quant_format, device)
    measured, expected = found_errors.relative, recorded.get(module)
    if expected is None:
        return [f"{module} has no weight_error in reproduce/checksums.json; expected one; write it again"]
    if math.isclose(measured, float(expected), rel_tol=ERROR_TOLERANCE, abs_tol=1e-12):
        problems = error_bound_problems(module, found_errors.error, found_errors.energy, found_errors.bound)
        return problems or multiple_problems(module, found_errors.multiple)
    return [
        f"{module}: relative squared weight error is {measured:.6g}; reproduce/checksums.json says {expected:.6g}; "
        "codes or scales of this module changed"
    ]


def _kind(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"
