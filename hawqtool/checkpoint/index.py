"""Where every tensor of a checkpoint lies, from the safetensors headers alone."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hawqtool.checkpoint.content import ContentRecord, Place
from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.links import check_links
from hawqtool.checkpoint.rotated.hadamard import Rotation
from hawqtool.errors import InputError, InputLostError
from hawqtool.parsing import MAX_JSON_BYTES, ParseError, load_json, parse_json, printable, short, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_DIMENSIONS = 64
"""As many as torch has; the product of millions of extents would take minutes."""
MAX_NAME = 1000
"""Most characters of a tensor's name, which messages and tables repeat."""
MAX_COUNT = 2**63 - 1
"""Largest extent or offset that torch and file systems know."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    Args:
        name: Name in the checkpoint.
        dtype: Safetensors name, such as ``BF16``.
        shape: Dimensions.
        file: File that holds it.
        start: Absolute byte offset in the file.
        num_bytes: Stored bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int

    @property
    def place(self) -> Place:
        """Where its bytes lie."""
        return self.file, self.start, self.num_bytes


@dataclass(frozen=True)
class ExpertStack:
    """How one tensor holds the same part of all experts of a layer.

    Args:
        experts: Stored name of the experts, ``M.experts``.
        linears: Names of the linears of an expert that share the tensor, gate before up.
        transposed: Whether an expert's matrix is ``[in, out]``.
        concatenated: Whether all rows of a linear come before those of the next; else they take turns.
        leaf: What it holds: ``weight`` or ``bias``.
    """

    experts: str
    linears: tuple[str, ...]
    transposed: bool
    concatenated: bool
    leaf: str


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint, in file order: file by file, by offset.

    Args:
        folder: Holds the files.
        files: Safetensors files.
        tensors: What they hold, by name; of a quantized original what its tensors stand for.
        source_format: How a quantized original is stored, for people; None where tensors are as stored.
        content: Compares what is read with what was read before; None where each read stands alone.
        stacks: Stored tensors of all experts of a layer that are seen as one tensor per expert, by name.
        rotation: Of the residual stream, where tensors on it are rotated as they are read.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    source_format: str | None = None
    content: ContentRecord | None = field(default=None, compare=False, repr=False)
    stacks: dict[str, ExpertStack] = field(default_factory=dict)
    rotation: Rotation | None = None

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes of the safetensors files, headers included."""
        return sum(file.stat().st_size for file in self.files)


def read_index(folder: Path) -> CheckpointIndex:
    """Read and check the headers of a checkpoint folder; no tensor data is read.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Raises:
        InputError: If the folder is not a safetensors checkpoint or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; expected one with config.json and safetensors files; check the path"
        )
    if not (folder / "config.json").is_file():
        raise no_config(folder)
    check_links(folder)
    files, weight_map = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file):
            if info.name in tensors:
                raise InputError(
                    f"tensor {info.name} is in both {tensors[info.name].file.name} and {file.name}; "
                    "expected each tensor once; save the checkpoint again"
                )
            tensors[info.name] = info
    _check_weight_map(folder, weight_map, tensors)
    return CheckpointIndex(folder, files, tensors)


def fingerprint(index: CheckpointIndex) -> str:
    """SHA-256 over ``config.json``, raw headers, file sizes and rotation: identifies a checkpoint without reading it.

    Weights that change while names, shapes and sizes stay are not noticed (see `weights_hash`).
    """
    digest = hashlib.sha256((index.folder / "config.json").read_bytes())
    for file in index.files:
        header, size = _raw_header(file)
        digest.update(f"\0{file.name}\0{size}\0".encode())
        digest.update(header)
    if index.rotation is not None:
        digest.update(json.dumps(index.rotation.record()).encode())
    return digest.hexdigest()


def stored_places(files: Sequence[Path]) -> list[Place]:
    """Places of all tensors that files store, whatever the model makes of them.

    Raises:
        InputError: If a header is damaged.
    """
    return [info.place for file in files for info in read_header(file)]


def weights_hash(files: Sequence[Path], content: ContentRecord) -> str:
    """SHA-256 over names, headers and the recorded hashes of all `stored_places`: identifies weights by every byte."""
    digest = hashlib.sha256()
    for file in files:
        header, size = _raw_header(file)
        digest.update(f"\0{file.name}\0{size}\0".encode() + header)
        for place in stored_places((file,)):
            digest.update(content[place])
    return digest.hexdigest()


def read_header(file: Path) -> tuple[TensorInfo, ...]:
    """Tensors of one safetensors file, by offset, after checking that they tile the data exactly.

    Raises:
        InputError: If the header or the file is damaged.
    """
    raw, size = _raw_header(file)
    data_start = 8 + len(raw)
    try:
        header = parse_json(raw)
    except ParseError as error:
        raise InputError(f"the header of {file} is not JSON to use ({error}); download or save it again") from None
    if not isinstance(header, dict):
        raise InputError(f"the header of {file} is not a JSON object; download or save the file again")
    infos = [_tensor(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.start, info.num_bytes))
    end = data_start
    for info in infos:
        if info.start != end:
            found = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise InputError(f"tensor {info.name} of {file} {found}; expected contiguous data; save the file again")
        end += info.num_bytes
    if end != size:
        found = "is truncated" if end > size else "has bytes after its last tensor"
        raise InputError(f"{file} {found}: it has {size} bytes, its header describes {end}; download it again")
    return tuple(infos)


def _raw_header(file: Path) -> tuple[bytes, int]:
    """Raw JSON bytes of the header, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise InputError(f"{file} has {size} bytes; expected a safetensors file; download it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_JSON_BYTES or 8 + length > size:
                raise InputError(
                    f"{file} declares a header of {length} bytes in a file of {size}; "
                    "expected a complete safetensors file; download it again"
                )
            return stream.read(length), size
    except OSError as error:
        raise InputLostError(
            f"{file} cannot be read ({error.strerror}); check that it exists and its permissions"
        ) from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name.isprintable() or len(name) > MAX_NAME:
        raise InputError(
            f"{file} names a tensor {printable(short(name))}; expected at most {MAX_NAME} characters, all of them "
            "printable; rename it"
        )
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(map(_is_count, shape))
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
    ):
        raise InputError(f"the header entry of {name} in {file} is malformed; expected dtype, shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(
            f"tensor {name} of {file} has dtype {_dtype_text(dtype)}; expected one of {', '.join(DTYPE_BYTES)}"
        )
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise InputError(
            f"tensor {name} of {file} spans {end - begin} bytes; expected {shown(expected)} for {dtype} "
            f"{shown(shape)}; save the file again"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, expected)


def _dtype_text(dtype: object) -> str:
    return printable(short(dtype)) if isinstance(dtype, str) else shown(dtype)


def no_config(folder: Path) -> InputError:
    """The error of a folder without config.json: what to do about it, by what the folder holds instead."""
    inside = sorted(path.parent for path in (*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")))
    advice = f"give a folder in it, such as {inside[0]}" if inside else "check the path"
    if (folder / "adapter_config.json").is_file():
        advice = "it holds an adapter, so merge that into its base model and give the merged folder"
    elif any(folder.glob("*.gguf")):
        advice = "it holds a GGUF file, so give the checkpoint that this was converted from"
    return InputError(f"{folder} has no config.json; expected it beside the safetensors files; {advice}")


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Safetensors files in order, and the index's weight map where there is one."""
    # The order in which transformers looks: a lone file wins over an index beside it.
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,), None
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        hint = "; pickled weights (*.bin, *.pt, *.pth) are never loaded: convert them to safetensors" if pickles else ""
        if others := len(list(folder.glob("*.safetensors"))):
            hint = f", one of these two beside {others} of another name; download the checkpoint again"
        raise InputError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}; expected safetensors weights{hint}")
    weight_map = _read_weight_map(index_path)
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or "\\" in shard or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise InputError(
                f"{index_path} names shard {shown(shard)}; expected the name of a safetensors file without a path; "
                "fix the index"
            )
        if not (folder / shard).is_file():
            raise InputError(f"{index_path} names shard {shard}, which is missing; download the checkpoint again")
    return tuple(folder / shard for shard in sorted(set(weight_map.values()))), weight_map


def _read_weight_map(index_path: Path) -> dict[str, str]:
    try:
        content = load_json(index_path)
    except ParseError as error:
        raise InputError(f"{index_path} is not readable JSON ({error}); download it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index_path} has no weight_map of tensor names to file names; download it again")
    return weight_map


def _check_weight_map(folder: Path, weight_map: dict[str, str] | None, tensors: dict[str, TensorInfo]) -> None:
    """The index and the headers must agree on where a tensor is: loaders trust the index, we read the headers.

    What no shard holds, such as a buffer of older days, matters only where the model needs it.
    """
    for name, shard in (weight_map or {}).items():
        if name in tensors and tensors[name].file.name != shard:
            raise InputError(
                f"{folder / INDEX_FILE} places tensor {name} in {shard}, but {tensors[name].file.name} holds it; "
                "expected an index that agrees with its shards; download the checkpoint again"
            )
