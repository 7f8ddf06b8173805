"""Is a GGUF file what its record says, and are its weights those of the original, as closely as recorded?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from hawqtool.checkpoint.gguf.block_codec import unpack_blocks
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.checkpoint.gguf.header import GgufHeader, read_gguf
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import load_config
from hawqtool.errors import InputError
from hawqtool.export.gguf.template import read_bytes
from hawqtool.export.manifest import file_hash
from hawqtool.export.packed_reader import relative_weight_error
from hawqtool.export.verify import VerifyReport
from hawqtool.pipeline.gguf.record import read_record, record_path, recorded_places
from hawqtool.pipeline.gguf.source import GgufSource
from hawqtool.pipeline.run.job import prepare
from hawqtool.report.documents import GgufDocument

_TOLERANCE = 1e-3
"""Most by which an error may differ from the recorded one, relative to it: sums run in other orders elsewhere."""


def verify_gguf(path: Path, against: str | None = None) -> VerifyReport:
    """Check a file against its record, and against the original where that is given.

    Args:
        path: A GGUF file that hawqtool wrote, its record beside it.
        against: The original: a folder or a hub id.

    Raises:
        InputError: If file, record or original cannot be read at all.
    """
    header, record = read_gguf(path), read_record(path)
    problems = [*_record_problems(header, record), *_scale_problems(header)]
    if against is not None and not problems:
        job = prepare(load_config(None, {"model": against, "device": "cpu", "profile": "transformers"}), writes=False)
        problems += origin_problems(path, record, job.index)
    blocks = sum(isinstance(tensor.kind, BlockType) for tensor in header.tensors.values())
    return VerifyReport(tuple(problems), len(header.tensors), blocks, header.total_bytes)


def _record_problems(header: GgufHeader, record: GgufDocument) -> Iterator[str]:
    name = header.path.name
    if header.total_bytes != record["bytes"]:
        yield f"{name} has {header.total_bytes} bytes; its record says {record['bytes']}"
    elif file_hash(header.path) != record["sha256"]:
        yield f"{name} has other bytes than its record, {record_path(header.path).name}, knows"
    for tensor, kind in record["types"].items():
        found = header.tensors.get(tensor)
        if found is None or found.kind.name != kind:
            yield f"tensor {tensor} is {'missing' if found is None else found.kind.name}; its record says {kind}"


def _scale_problems(header: GgufHeader) -> Iterator[str]:
    """Block scales that are NaN or infinite, which llama.cpp's own check refuses."""
    for tensor in header.tensors.values():
        if isinstance(tensor.kind, BlockType):
            stored = torch.frombuffer(bytearray(read_bytes(header, tensor)), dtype=torch.uint8)
            fields = unpack_blocks(stored.view(math.prod(tensor.shape[:-1]), -1), tensor.kind)
            numbers = [part for part in (fields.scale, fields.minimum) if part is not None]
            if not all(bool(torch.isfinite(part).all()) for part in numbers):
                yield f"tensor {tensor.name} has block scales that are NaN or Inf"


def origin_problems(path: Path, record: GgufDocument, index: CheckpointIndex) -> list[str]:
    """Where the file's weights are not the checkpoint's rounded ones, by the recorded error of every matrix.

    Args:
        path: The file.
        record: Its record.
        index: The checkpoint.
    """
    source, reader = GgufSource(path, recorded_places(path, record), index), TensorReader(index)
    problems = []
    for name, matrix in record["matrices"].items():
        if name not in reader:
            problems.append(f"{name} is not in {index.folder.name}; its record names it")
            continue
        original, restored = reader.tensor(name), source.tensor(name)
        if original.shape != restored.shape:
            problems.append(f"{name} is {list(original.shape)}; the file has {list(restored.shape)}")
            continue
        found, expected = relative_weight_error(original, restored), matrix["weight_error"]
        if not math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=1e-12):
            problems.append(
                f"{name} differs from {index.folder.name}'s by {found:.3g} of its power, not {expected:.3g}"
            )
    return problems


def require_origin(path: Path, record: GgufDocument, index: CheckpointIndex) -> None:
    """Check that a file was made from a checkpoint.

    Raises:
        InputError: Otherwise.
    """
    problems = origin_problems(path, record, index)
    if problems:
        raise InputError(
            f"{path} is not what was made from {index.folder.name}, so a comparison would say nothing: {problems[0]} "
            f"({len(problems)} such); give its original"
        )
