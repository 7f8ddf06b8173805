"""Headers of GGUF files: what they say of the model, and where each tensor lies.

Integers are little-endian. A file has a count of tensors and of metadata, the metadata (key, type, value), the table
of tensors (name, dimensions, type, offset), then the tensors, each at a multiple of the alignment (the specification:
ggml/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hawqtool.checkpoint.gguf.block_types import STORED_TYPES, StoredType
from hawqtool.errors import InputError, InputLostError
from hawqtool.parsing import printable, short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
ARCHITECTURE_KEY, FILE_TYPE_KEY = "general.architecture", "general.file_type"

MAX_TENSORS, MAX_FIELDS, MAX_DIMENSIONS = 1_000_000, 100_000, 4

_NUMBERS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
"""Formats of `struct` by type of value; 8 is a text and 9 a list."""
_TEXT, _LIST = 8, 9


@dataclass(frozen=True)
class GgufField:
    """One entry of the metadata.

    Args:
        key: Its name.
        value: A number, a text or a flag; of a list how many values it has.
        raw: All its bytes, key included, which a copy repeats as they are.
    """

    key: str
    value: Any
    raw: bytes


@dataclass(frozen=True)
class GgufTensor:
    """One stored tensor.

    Args:
        name: Its name.
        kind: Its type.
        shape: Dimensions as torch has them, the longest stride first; the file has them the other way round.
        start: Absolute byte offset.
        num_bytes: Stored bytes.
    """

    name: str
    kind: StoredType
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_weights(self) -> int:
        """Numbers that it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """All but the tensors' bytes.

    Args:
        path: The file.
        version: Of the format.
        alignment: What offsets of tensors are multiples of.
        fields: Metadata by key, in the file's order.
        tensors: By name, in the file's order.
        total_bytes: Size of the file.
    """

    path: Path
    version: int
    alignment: int
    fields: dict[str, GgufField]
    tensors: dict[str, GgufTensor]
    total_bytes: int

    def text(self, key: str) -> str | None:
        """A text of the metadata; None where there is none of that key."""
        found = self.fields.get(key)
        return found.value if found is not None and isinstance(found.value, str) else None


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file: it begins as these do, or is named so and is no folder."""
    if path.suffix == ".gguf":
        return not path.is_dir()  # read_gguf says what is wrong with it
    try:
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufHeader:
    """Read and check a header; no tensor data is read.

    Raises:
        InputError: If the file is no GGUF file of version 2 or 3, is damaged, or has a type that is not known.
    """
    try:
        with path.open("rb") as stream:
            return _Parser(path, stream, path.stat().st_size).header()
    except OSError as error:
        raise InputLostError(
            f"{path} cannot be read ({error.strerror}); check that it exists and its permissions"
        ) from None


class _Parser:
    """Reads a header front to back, never past the end of the file."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path, self.stream, self.size, self.at = path, stream, size, 0

    def header(self) -> GgufHeader:
        if self.size < 4 or self.take(4) != MAGIC:
            raise InputError(f"{self.path} does not begin with GGUF; expected a file of llama.cpp; check the path")
        version = self.number("I")
        if version not in VERSIONS:
            raise InputError(f"{self.path} is GGUF version {version}; expected 2 or 3; convert the model again")
        tensors, fields = self.count(MAX_TENSORS, "tensors"), self.count(MAX_FIELDS, "metadata entries")
        metadata: dict[str, GgufField] = {}
        for _ in range(fields):
            field = self.field()
            if field.key in metadata:
                raise self.damaged(f"names {printable(short(field.key))} twice in its metadata")
            metadata[field.key] = field
        alignment = metadata[ALIGNMENT_KEY].value if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & 7:
            raise self.damaged(f"has an alignment of {short(str(alignment))}; expected a multiple of 8")
        table = [self.tensor() for _ in range(tensors)]
        start = aligned(self.at, alignment)
        found: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in table:
            num_bytes = kind.num_bytes(math.prod(shape))
            if name in found:
                raise self.damaged(f"names tensor {name} twice")
            if offset % alignment or start + offset + num_bytes > self.size:
                raise self.damaged(f"has {self.size} bytes, and tensor {name} of {num_bytes} lies at {start + offset}")
            found[name] = GgufTensor(name, kind, shape, start + offset, num_bytes)
        return GgufHeader(self.path, version, alignment, metadata, found, self.size)

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.path} {what}; the file is damaged: download or convert it again")

    def take(self, count: int) -> bytes:
        data = self.stream.read(count) if count <= self.size - self.at else b""
        if len(data) != count:
            raise self.damaged(f"ends inside its header, at byte {self.at}")
        self.at += count
        return data

    def number(self, kind: str) -> Any:
        layout = f"<{kind}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, most: int, what: str) -> int:
        found = int(self.number("Q"))
        if found > most:
            raise self.damaged(f"declares {found} {what}; at most {most} are read")
        return found

    def text_bytes(self) -> tuple[bytes, bytes]:
        """A text, and its bytes with their count."""
        length = self.take(8)
        data = self.take(int.from_bytes(length, "little"))
        return data, length + data

    def name(self) -> tuple[str, bytes]:
        data, raw = self.text_bytes()
        text = data.decode("utf-8", errors="replace")
        if not text.isprintable() or not 0 < len(text) <= 1000:
            raise self.damaged(f"has the name {printable(short(text))!r}; expected up to 1000 printable characters")
        return text, raw

    def field(self) -> GgufField:
        key, raw = self.name()
        kind = self.take(4)
        value, data = self.value(int.from_bytes(kind, "little"))
        return GgufField(key, value, raw + kind + data)

    def value(self, kind: int) -> tuple[Any, bytes]:
        """A value, of lists their length, with its bytes."""
        if kind == _TEXT:
            text, raw = self.text_bytes()
            return text.decode("utf-8", errors="replace"), raw
        if kind == _LIST:
            inner, head = int.from_bytes(start := self.take(4), "little"), self.take(8)
            count = int.from_bytes(head, "little")
            if inner == _TEXT:
                # Each text has at least the eight bytes of its length, so a wrong count ends with the file.
                return count, b"".join([start, head, *(self.text_bytes()[1] for _ in range(count))])
            return count, start + head + self.take(count * self.width(inner))
        width = self.width(kind)
        data = self.take(width)
        return struct.unpack(f"<{_NUMBERS[kind]}", data)[0], data

    def width(self, kind: int) -> int:
        if kind not in _NUMBERS:
            raise self.damaged(f"has a value of type {kind}, which is not known")
        return struct.calcsize(f"<{_NUMBERS[kind]}")

    def tensor(self) -> tuple[str, StoredType, tuple[int, ...], int]:
        name, _ = self.name()
        dimensions = self.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self.damaged(f"gives tensor {name} {dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(int(self.number("Q")) for _ in range(dimensions))[::-1]
        number, offset = self.number("I"), int(self.number("Q"))
        if number not in STORED_TYPES:
            raise InputError(
                f"tensor {name} of {self.path} has type {number}, which this version does not know; expected one of "
                f"{', '.join(kind.name for kind in STORED_TYPES.values())}"
            )
        kind = STORED_TYPES[number]
        if shape[-1] % kind.block_size:
            raise self.damaged(f"stores rows of {shape[-1]} numbers of tensor {name} in blocks of {kind.block_size}")
        return name, kind, shape, offset


def aligned(offset: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // alignment) * alignment
