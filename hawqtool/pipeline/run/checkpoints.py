"""Finished work on disk: one file per key, complete or absent at every moment, trusted only by checksum."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hawqtool.checkpoint.dtypes import dtype_name, torch_dtype
from hawqtool.errors import disk_errors
from hawqtool.pipeline.run.files import PART

SAMPLED = "sampled-rows"
"""Key under which rows that the model wrote are saved."""


SUFFIX = ".state"
_TENSOR = "$tensor"
_LENGTH_BYTES, _DIGEST_BYTES = 8, 32
_PIECE_BYTES = 64 << 20
"""Bytes that are read together."""


class Checkpoints:
    """Contents by key in a folder (see `hawqtool.runtime.store.Saved`).

    A file holds the length of a header, the header (the content as JSON, tensors being replaced by their numbers, and
    the dtypes and shapes of these), the bytes of the tensors, and a checksum of its name and all of that. It is written
    beside its place, brought to the disk and renamed, so a process that is killed or a disk that fills leaves the
    earlier content or none. Nothing in it is executed when it is read.

    Args:
        folder: Existing folder.
        prefix: What the names of this part's files begin with.
        warn: Is told of files that are damaged.
    """

    def __init__(self, folder: Path, prefix: str = "", warn: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.prefix, self.warn = folder, prefix, warn

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, as ranks of a run are, nobody is told of damaged files."""
        return Checkpoints, (self.folder, self.prefix)

    def part(self, name: str) -> Checkpoints:
        """The same folder with keys of its own for one part of the work."""
        return Checkpoints(self.folder, f"{self.prefix}{name}.", self.warn)

    def keys(self) -> list[str]:
        """Keys of this part and of the parts below it, sorted."""
        return sorted(p.name[len(self.prefix) : -len(SUFFIX)] for p in self.folder.glob(f"{self.prefix}*{SUFFIX}"))

    def has(self, key: str) -> bool:
        """Whether something was saved under a key."""
        return self._path(key).is_file()

    def load(self, key: str) -> Any:
        """What was saved under a key; None where nothing was, or where it is damaged: such a file is removed."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with path.open("rb") as stream:
                return _read(stream, path.name)
        except (OSError, ValueError) as error:
            self.warn(f"{path}, which an earlier run saved, is damaged ({error}); that part is done again")
        with disk_errors(self.folder):
            path.unlink()
        return None

    def save(self, key: str, content: Any) -> None:
        """Keep a content, in the place of an earlier one.

        Raises:
            ResourceError: If the disk refuses; an earlier content is still there then.
        """
        path = self._path(key)
        temporary = path.with_name(path.name + PART)
        with disk_errors(self.folder):
            try:
                with temporary.open("wb", buffering=0) as stream:
                    _write(stream, content, path.name)
                    os.fsync(stream.fileno())
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)  # on a full disk its blocks are needed
                raise

    def drop(self, *keys: str) -> None:
        """Forget contents, as far as there are any; without keys all of this part."""
        for key in keys or self.keys():
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = f"{self.prefix}{key}{SUFFIX}"
        assert re.fullmatch(r"[\w.-]+", name), name
        return self.folder / name


def _write(stream: BinaryIO, content: Any, name: str) -> None:
    tensors: list[Tensor] = []
    tree = _flatten(content, tensors)
    described = [{"dtype": dtype_name(t.dtype), "shape": list(t.shape)} for t in tensors]
    header = json.dumps({"content": tree, "tensors": described}).encode()
    digest = _digest_of(name)
    parts: list[bytes | memoryview] = [len(header).to_bytes(_LENGTH_BYTES, "little"), header]
    for data in chain(parts, map(_bytes_of, tensors)):
        digest.update(data)
        _write_all(stream, data)
    _write_all(stream, digest.digest())


def _digest_of(name: str) -> hashlib.blake2b:
    """The checksum of a file so far: of its name, so that files that change places are found."""
    return hashlib.blake2b(name.encode(), digest_size=_DIGEST_BYTES)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write_all(stream: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[stream.write(view) :]


def _flatten(content: Any, tensors: list[Tensor]) -> Any:
    """The content with tensors replaced by their numbers in a list."""
    if isinstance(content, Tensor):
        tensors.append(content)
        return {_TENSOR: len(tensors) - 1}
    if isinstance(content, dict):
        if not all(isinstance(key, str) for key in content):
            raise TypeError("only strings can be the keys of what is saved")
        return {key: _flatten(value, tensors) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_flatten(value, tensors) for value in content]
    return content


def _read(stream: BinaryIO, name: str) -> Any:
    """The content of a file; its checksum is compared before anything in it is believed.

    Raises:
        ValueError: If the checksum is another one.
    """
    size = os.fstat(stream.fileno()).st_size - _DIGEST_BYTES
    digest = _digest_of(name)
    for start in range(0, size, _PIECE_BYTES):
        digest.update(stream.read(min(_PIECE_BYTES, size - start)))
    if size < _LENGTH_BYTES or stream.read() != digest.digest():
        raise ValueError("its checksum differs")
    stream.seek(0)
    header = json.loads(stream.read(int.from_bytes(stream.read(_LENGTH_BYTES), "little")))
    tensors = [_read_tensor(stream, torch_dtype(d["dtype"]), d["shape"]) for d in header["tensors"]]
    return _restore(header["content"], tensors)


def _read_tensor(stream: BinaryIO, dtype: torch.dtype, shape: list[int]) -> Tensor:
    buffer = bytearray(math.prod(shape) * dtype.itemsize)
    if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise ValueError("it ends inside a tensor")
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)


def _restore(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _restore(value, tensors) for key, value in tree.items()}
    return [_restore(value, tensors) for value in tree] if isinstance(tree, list) else tree
