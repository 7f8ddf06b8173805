"""What a GGUF file holds, from its header alone (schema ``hawqtool.inspect/1``, kind ``gguf``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hawqtool.checkpoint.gguf.header import ARCHITECTURE_KEY, GgufTensor, read_gguf
from hawqtool.report.wording import role

SCHEMA = "hawqtool.inspect/1"


def describe_gguf(path: Path) -> dict[str, Any]:
    """Types, sizes and stored bits of any GGUF file, whoever wrote it.

    Returns:
        ``architecture``, ``name``, ``bytes``, ``tensors``, ``elements``, ``matrices`` and ``vectors`` (weights and
        bytes of tensors of two or more dimensions and of the others), ``bpw_matrices``, ``bpw_file``, ``types`` (by
        type: tensors, elements, bytes, bits per weight) and ``roles`` (matrices by role, shape and type).

    Raises:
        InputError: If the file is no GGUF file or is damaged.
    """
    header = read_gguf(path)
    tensors = list(header.tensors.values())
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    elements = sum(tensor.num_weights for tensor in tensors)
    return {
        "schema": SCHEMA,
        "kind": "gguf",
        "model": path.name,
        "name": header.text("general.name"),
        "architecture": header.text(ARCHITECTURE_KEY),
        "version": header.version,
        "bytes": header.total_bytes,
        "tensors": len(tensors),
        "elements": elements,
        "metadata": len(header.fields),
        "bpw_matrices": _bits(matrices),
        "bpw_file": 8 * header.total_bytes / max(elements, 1),
        "types": _types(tensors),
        "roles": _roles(matrices),
    }


def _bits(tensors: Iterable[GgufTensor]) -> float | None:
    found = list(tensors)
    return 8 * sum(t.num_bytes for t in found) / sum(t.num_weights for t in found) if found else None


def _types(tensors: Iterable[GgufTensor]) -> dict[str, dict[str, Any]]:
    """Types by what they take of the file, the most first."""
    members: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        members.setdefault(tensor.kind.name, []).append(tensor)
    found = {
        name: {
            "tensors": len(group),
            "elements": sum(t.num_weights for t in group),
            "bytes": sum(t.num_bytes for t in group),
            "bits": group[0].kind.bits,
        }
        for name, group in members.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _roles(matrices: Iterable[GgufTensor]) -> list[dict[str, Any]]:
    """Matrices of one role and shape, with how many have which type."""
    members: dict[tuple[str, tuple[int, ...]], list[GgufTensor]] = {}
    for tensor in matrices:
        members.setdefault((role(tensor.name).removesuffix(".weight"), tensor.shape), []).append(tensor)
    return [
        {
            "role": name,
            "shape": list(shape),
            "count": len(group),
            "weights": sum(t.num_weights for t in group),
            "bytes": sum(t.num_bytes for t in group),
            "bpw": _bits(group),
            "types": _counts(group),
        }
        for (name, shape), group in members.items()
    ]


def _counts(group: list[GgufTensor]) -> dict[str, int]:
    names = [tensor.kind.name for tensor in group]
    return {name: names.count(name) for name in sorted(set(names))}
