"""Finished work on disk: one file per key, complete or absent at every moment."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hawqtool.checkpoint.dtypes import dtype_name, torch_dtype
from hawqtool.errors import InputError, disk_errors
from hawqtool.pipeline.run.files import PART

SAMPLED = "sampled-rows"
"""Key under which rows that the model wrote are saved."""


SUFFIX = ".state"
_TENSOR = "$tensor"
_LENGTH_BYTES = 8


class Checkpoints:
    """Contents by key in a folder (see `hawqtool.runtime.store.Saved`).

    A file holds the length of a header, the header (the content as JSON, tensors being replaced by their numbers, and
    the dtypes and shapes of these) and the bytes of the tensors. It is written beside its place, brought to the disk
    and renamed, so a process that is killed or a disk that fills leaves the earlier content or none. Nothing in it is
    executed when it is read.

    Args:
        folder: Existing folder.
        prefix: What the names of this part's files begin with.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix

    def part(self, name: str) -> Checkpoints:
        """The same folder with keys of its own for one part of the work."""
        return Checkpoints(self.folder, f"{self.prefix}{name}.")

    def keys(self) -> list[str]:
        """Keys of this part and of the parts below it, sorted."""
        return sorted(p.name[len(self.prefix) : -len(SUFFIX)] for p in self.folder.glob(f"{self.prefix}*{SUFFIX}"))

    def has(self, key: str) -> bool:
        """Whether something was saved under a key."""
        return self._path(key).is_file()

    def load(self, key: str) -> Any:
        """What was saved under a key; None where nothing was.

        Raises:
            InputError: If the file is damaged.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with path.open("rb") as stream:
                return _read(stream)
        except (OSError, ValueError, LookupError, TypeError, RecursionError, InputError) as error:
            raise InputError(
                f"{path}, which an earlier run saved, is damaged ({error}); run without --resume"
            ) from None

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
                    _write(stream, content)
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


def _write(stream: BinaryIO, content: Any) -> None:
    tensors: list[Tensor] = []
    tree = _flatten(content, tensors)
    described = [{"dtype": dtype_name(t.dtype), "shape": list(t.shape)} for t in tensors]
    header = json.dumps({"content": tree, "tensors": described}).encode()
    _write_all(stream, len(header).to_bytes(_LENGTH_BYTES, "little"))
    _write_all(stream, header)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            _write_all(stream, flat.view(torch.uint8).numpy().data)


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


def _read(stream: BinaryIO) -> Any:
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    size = os.fstat(stream.fileno()).st_size
    if length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(stream.read(length))
    tensors = [_read_tensor(stream, torch_dtype(d["dtype"]), d["shape"]) for d in header["tensors"]]
    if stream.read(1):
        raise ValueError("bytes after the last tensor")
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
