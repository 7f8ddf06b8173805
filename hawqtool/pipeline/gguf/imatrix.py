"""The importance matrix that llama-quantize reads: mean squares of the inputs of every tensor."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_types import STORED_TYPES
from hawqtool.checkpoint.gguf.header import DEFAULT_ALIGNMENT, GgufField, GgufHeader, GgufTensor
from hawqtool.export.gguf.writer import GgufWriter, plan_gguf
from hawqtool.pipeline.gguf.tensors import GgufJob
from hawqtool.records import Rows
from hawqtool.rounding.spec import InputGroups
from hawqtool.streaming.input_statistics import collect_statistics

_UINT32, _TEXT, _LIST = 4, 8, 9


@dataclass(frozen=True)
class InputPower:
    """What a linear saw.

    Args:
        sums: ``[in]`` float32, sum of squared inputs over the tokens.
        tokens: How many.
    """

    sums: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        """``[in]`` float32, mean square of every input."""
        return self.sums / max(self.tokens, 1)


def input_power(gguf: GgufJob, rows: Rows) -> dict[str, InputPower]:
    """Squared inputs of every linear of the original on some rows, by linear; all tokens count alike."""
    job, found = gguf.job, dict[str, InputPower]()
    stream = job.stream()
    activations = stream.embed(rows.tokens, job.settings.batch_size)
    stream.release_ends()

    def visit(groups: InputGroups) -> None:
        for group, statistics in groups:
            sums = (statistics.gram.diagonal() * statistics.num_tokens).cpu()
            found.update({linear.name: InputPower(sums, statistics.num_tokens) for linear in group})

    for spec in job.structure.blocks:
        with stream.block(spec.index) as block:
            collect_statistics(block, activations, visit)
    return found


def write_imatrix(path: Path, gguf: GgufJob, power: Mapping[str, InputPower], rows: Rows) -> None:
    """Write an importance matrix as a GGUF file, which llama-quantize takes with ``--imatrix``.

    Each tensor has sums of squared inputs, ``NAME.in_sum2``, and tokens, ``NAME.counts``, a row for each expert
    (llama.cpp, tools/imatrix).

    Args:
        path: The file.
        gguf: The job.
        power: Squared inputs by linear.
        rows: Rows that they were measured on.

    Raises:
        ResourceError: If the disk refuses.
    """
    tensors = dict(_tensors(gguf, power))
    plain = STORED_TYPES[0]
    table = {n: GgufTensor(n, plain, tuple(v.shape), 0, plain.num_bytes(v.numel())) for n, v in tensors.items()}
    fields = (
        _field("general.type", _TEXT, _text("imatrix")),
        _field("imatrix.datasets", _LIST, _texts([rows.source])),
        _field("imatrix.chunk_count", _UINT32, struct.pack("<I", len(rows.tokens))),
        _field("imatrix.chunk_size", _UINT32, struct.pack("<I", rows.tokens.shape[1])),
    )
    header = GgufHeader(path, 3, DEFAULT_ALIGNMENT, {field.key: field for field in fields}, table, 0)
    with GgufWriter(header, plan_gguf(header, {}), path) as writer:
        for name, values in tensors.items():
            writer.write(name, values.contiguous().view(torch.uint8))


def _tensors(gguf: GgufJob, power: Mapping[str, InputPower]) -> Iterator[tuple[str, Tensor]]:
    places: dict[str, list[InputPower]] = {}
    for name, place in sorted(gguf.places.items(), key=lambda item: item[1].first_row):
        seen = power.get(name.removesuffix(".weight"))
        if seen is not None:
            places.setdefault(place.tensor, []).append(seen)
    for tensor, parts in places.items():
        yield f"{tensor}.in_sum2", torch.stack([part.sums for part in parts])
        yield f"{tensor}.counts", torch.tensor([[float(part.tokens)] for part in parts])


def _field(key: str, kind: int, data: bytes) -> GgufField:
    return GgufField(key, None, _text(key) + struct.pack("<I", kind) + data)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _texts(texts: Sequence[str]) -> bytes:
    return struct.pack("<IQ", _TEXT, len(texts)) + b"".join(map(_text, texts))
