"""Writing a GGUF file of known size: a template's metadata, tensors in new types, all else as it was."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from torch import Tensor

from hawqtool.checkpoint.gguf.block_types import STORED_TYPES, StoredType
from hawqtool.checkpoint.gguf.header import FILE_TYPE_KEY, MAGIC, GgufField, GgufHeader, GgufTensor, aligned
from hawqtool.errors import NumericalError, disk_errors
from hawqtool.export.gguf.template import read_bytes

QUANTIZATION_VERSION_KEY, QUANTIZATION_VERSION = "general.quantization_version", 2

_FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12},
    **{"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32},
}
"""Number of ``general.file_type``, which llama.cpp only prints, by the type that most weights have."""

_UINT32 = 4


@dataclass(frozen=True)
class GgufLayout:
    """The exact bytes of a file before it is written.

    Args:
        head: All bytes before the first tensor.
        tensors: What follows, in order; offsets are absolute.
        total_bytes: Size of the file.
    """

    head: bytes
    tensors: dict[str, GgufTensor]
    total_bytes: int


def plan_gguf(template: GgufHeader, kinds: Mapping[str, StoredType]) -> GgufLayout:
    """Lay out the template with other types for some tensors.

    Args:
        template: Header of the template.
        kinds: Types by name of tensor; the others keep theirs.
    """
    tensors = [(t, kinds.get(t.name, t.kind)) for t in template.tensors.values()]
    fields = template.fields | {f.key: f for f in _labels(tensors)}
    counts = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(fields))
    table, offset, offsets = b"", 0, []
    for tensor, kind in tensors:
        name = tensor.name.encode()
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        table += struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", kind.number, offset)
        offsets.append(offset)
        offset = aligned(offset + kind.num_bytes(tensor.num_weights), template.alignment)
    head = counts + b"".join(field.raw for field in fields.values()) + table
    start = aligned(len(head), template.alignment)
    placed = {
        t.name: GgufTensor(t.name, kind, t.shape, start + at, kind.num_bytes(t.num_weights))
        for (t, kind), at in zip(tensors, offsets, strict=True)
    }
    return GgufLayout(head.ljust(start, b"\0"), placed, start + offset)


def _labels(tensors: list[tuple[GgufTensor, StoredType]]) -> Iterator[GgufField]:
    """Metadata that says what is stored: the type of most weights, and the version of the block layouts."""
    weights: dict[str, int] = {}
    for tensor, kind in tensors:
        weights[kind.name] = weights.get(kind.name, 0) + tensor.num_weights
    most = max(weights, key=lambda name: weights[name])
    if most in _FILE_TYPES:
        yield _number(FILE_TYPE_KEY, _FILE_TYPES[most])
    plain = {STORED_TYPES[number].name for number in (0, 1, 30)}
    if set(weights) - plain:
        yield _number(QUANTIZATION_VERSION_KEY, QUANTIZATION_VERSION)


def _number(key: str, value: int) -> GgufField:
    name = key.encode()
    return GgufField(key, value, struct.pack("<Q", len(name)) + name + struct.pack("<II", _UINT32, value))


class GgufWriter:
    """Writes the tensors of a layout in any order; a context manager.

    Leaving the block without an exception copies from the template what was not written, syncs the file and gives it
    its name; with one, nothing is left, or the unfinished file where a run may go on with it.

    Args:
        template: Header of the template.
        layout: Layout of the file.
        path: The file.
        resumes: Whether an unfinished file is kept, and gone on with where it has the layout's head.

    Attributes:
        resumed: Whether an unfinished file was there.
    """

    def __init__(self, template: GgufHeader, layout: GgufLayout, path: Path, resumes: bool = False) -> None:
        self._template, self._layout, self.path, self._resumes = template, layout, path, resumes
        self.resumed = False
        self._part = path.with_name(f"{path.name}.part")
        self._written: set[str] = set()
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self.resumed = self._resumes and self._has_head()
            self._stream = self._part.open("r+b" if self.resumed else "wb")
            if not self.resumed:
                self._stream.write(self._layout.head)
                self._stream.truncate(self._layout.total_bytes)
        return self

    def _has_head(self) -> bool:
        """Whether an unfinished file of this layout is there."""
        if not self._part.is_file() or self._part.stat().st_size != self._layout.total_bytes:
            return False
        with self._part.open("rb") as stream:
            return stream.read(len(self._layout.head)) == self._layout.head

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None  # entered
        try:
            if kind is None:
                self._copy_rest()
                self.sync()
                with disk_errors(self.path):
                    self._stream.close()
                    self._part.rename(self.path)
        finally:
            self._stream.close()
            if not self._resumes:
                self._part.unlink(missing_ok=True)

    def take_over(self, names: Collection[str]) -> None:
        """Take tensors for written that an earlier run wrote and brought to the disk."""
        self._written.update(names)

    def sync(self) -> None:
        """Bring to the disk what was written."""
        assert self._stream is not None  # entered
        with disk_errors(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def digest(self, names: Iterable[str]) -> str:
        """Checksum of what the file holds of some tensors."""
        found = hashlib.blake2b(digest_size=32)
        with disk_errors(self.path), self._part.open("rb") as stream:
            for place in (self._layout.tensors[name] for name in sorted(names)):
                stream.seek(place.start)
                found.update(stream.read(place.num_bytes))
        return found.hexdigest()

    def write(self, name: str, stored: Tensor, first_row: int = 0) -> None:
        """Write rows of a tensor.

        Args:
            name: Name of the tensor.
            stored: ``[rows, bytes of a row]`` uint8.
            first_row: Their place in the tensor, of which experts lie below each other.

        Raises:
            NumericalError: If they do not fit, or the disk refuses.
        """
        place = self._layout.tensors[name]
        data = stored.cpu().contiguous().numpy().tobytes()
        at = first_row * stored.shape[1]
        if at + len(data) > place.num_bytes:
            raise NumericalError(f"tensor {name} has {place.num_bytes} bytes; {len(data)} at {at} do not fit")
        self._put(place.start + at, data)
        self._written.add(name)

    def _copy_rest(self) -> None:
        for name, place in self._layout.tensors.items():
            if name in self._written:
                continue
            known = self._template.tensors[name]
            if known.kind != place.kind:
                raise NumericalError(f"tensor {name} was not written; expected all that have a new type; run again")
            self._put(place.start, read_bytes(self._template, known))

    def _put(self, at: int, data: bytes) -> None:
        assert self._stream is not None  # entered
        with disk_errors(self.path):
            self._stream.seek(at)
            self._stream.write(data)
