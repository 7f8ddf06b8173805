"""Tools to change an output folder: tensors, headers, JSON files, and all records of it as a forger would."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError, ResourceError
from hawqtool.export.compressed_tensors import module_format
from hawqtool.export.config_checks import packed_modules
from hawqtool.export.manifest import seal
from hawqtool.export.packed_reader import packed_errors, packed_parts, read_config

Edit = Callable[[Path], None]
WEIGHTS = "model.safetensors"


def json_edit(name: str, change: Callable[[Any], Any]) -> Edit:
    """Change the content of a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    return edit


def tensor_edit(name: str, change: Callable[[Tensor], Any]) -> Edit:
    """Change a stored tensor in place."""

    def edit(folder: Path) -> None:
        info = read_index(folder).tensors[name]
        data = bytearray(info.file.read_bytes())
        part = torch.frombuffer(data, dtype=torch.uint8)[info.start : info.start + info.num_bytes].clone()
        tensor = part.view(torch_dtype(info.dtype)).view(info.shape)
        change(tensor)
        data[info.start : info.start + info.num_bytes] = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        info.file.write_bytes(data)

    return edit


def swap_edit(first: str, second: str) -> Edit:
    """Exchange the data of two tensors of equal size."""

    def edit(folder: Path) -> None:
        reader = TensorReader(read_index(folder))
        a, b = reader.tensor(first).clone(), reader.tensor(second).clone()
        tensor_edit(first, lambda t: t.copy_(b))(folder)
        tensor_edit(second, lambda t: t.copy_(a))(folder)

    return edit


def header_edit(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Change the header of the weights; the data stays as it is."""

    def edit(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return edit


def bytes_edit(name: str, change: Callable[[bytes], bytes]) -> Edit:
    """Change the bytes of a file."""
    return lambda folder: _write(folder / name, change((folder / name).read_bytes()))


def added(name: str, text: str = "x") -> Edit:
    """Add a file."""
    return lambda folder: _write(folder / name, text.encode())


def removed(name: str) -> Edit:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def forge(folder: Path, source: Path) -> None:
    """Make all records agree with what a folder holds, as far as it can be read."""
    try:
        index = read_index(folder)
        reader, original = TensorReader(index), TensorReader(read_index(source))
        record = json.loads((folder / "reproduce/checksums.json").read_text())
        record["tensors"] = {name: hashlib.sha256(reader.raw(name)).hexdigest() for name in index.tensors}
        for module in packed_modules(index):
            error = _error(folder, reader, original, module)
            record["weight_error"] |= {} if error is None else {module: error}
        (folder / "reproduce/checksums.json").write_text(json.dumps(record))
    except (InputError, OSError, ValueError):
        pass  # what cannot be read cannot be forged either
    path = folder / "report.json"
    report: Any = json.loads(path.read_text()) if path.is_file() else {"schema": "hawqtool.report/2"}
    with suppress(InputError, ResourceError):
        seal(folder, report)


def _error(folder: Path, reader: TensorReader, source: TensorReader, module: str) -> float | None:
    """Relative squared error of a module, where its parts go together."""
    try:
        quant_format = module_format(read_config(folder)["quantization_config"], module)
        parts = packed_parts(reader, module)
        return packed_errors(source.tensor(f"{module}.weight"), parts, quant_format, torch.device("cpu")).relative
    except (InputError, RuntimeError, LookupError, TypeError):
        return None
