"""The exact bytes of the output's safetensors files, known before anything is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.checkpoint.index import SINGLE_FILE, CheckpointIndex, TensorInfo
from hawqtool.errors import InputError
from hawqtool.formats import QuantFormat
from hawqtool.formats.cache import KEY_LAYER
from hawqtool.formats.grids import StoredPart
from hawqtool.records import LayerFormats, LinearSpec

if TYPE_CHECKING:
    from hawqtool.export.embedding_table import EmbeddingTable

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file.

    Args:
        name: Name in the output.
        dtype: Safetensors name, such as ``I32``.
        shape: Dimensions.
        offset: Absolute byte offset in its file.
        num_bytes: Stored bytes.
        source: Source tensor that is copied verbatim; None for what packing produces.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    source: str | None


@dataclass(frozen=True)
class FileLayout:
    """One output file: 8-byte length, JSON header padded with spaces to a multiple of 8, then the tensors."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(entry.num_bytes for entry in self.entries)


@dataclass(frozen=True)
class Layout:
    """All output files that hold tensors."""

    files: tuple[FileLayout, ...]

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes of the safetensors files, headers included."""
        return sum(file.total_bytes for file in self.files)

    def index_json(self) -> dict[str, Any] | None:
        """Content of ``model.safetensors.index.json``; None for a single file, which needs none."""
        if len(self.files) == 1:
            return None
        tensor_bytes = sum(entry.num_bytes for file in self.files for entry in file.entries)
        weight_map = {entry.name: file.name for file in self.files for entry in file.entries}
        return {"metadata": {"total_size": tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def plan_layout(
    index: CheckpointIndex,
    formats: LayerFormats,
    specs: dict[str, LinearSpec],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tables: Collection[EmbeddingTable] = (),
    caches: Mapping[str, Sequence[StoredPart]] | None = None,
) -> Layout:
    """Lay out the quantized checkpoint.

    ``M.weight`` of a quantized module is replaced by the tensors of its format (see `QuantFormat.parts`), which stay
    in one shard; every other tensor keeps its name and bytes. Shards are filled in source order up to
    ``max_shard_bytes`` of tensor data; a larger tensor gets a shard of its own.

    Args:
        index: The source.
        formats: Format of every quantized module, by module name.
        specs: Shapes of at least these modules.
        max_shard_bytes: Limit of the tensor bytes of one file.
        tables: Embeddings that are stored in 8 bits.
        caches: Scales of the KV cache by name of the attention; they lie beside the weight of its keys.

    Raises:
        InputError: If a quantized weight is not in the source, has another shape, or is not divided by its groups.
    """
    _check_sources(index, formats, specs)
    shards: list[list[Entry]] = [[]]
    filled, by_tensor = 0, {table.tensor: table for table in tables}
    anew = {name + part.suffix for name, parts in (caches or {}).items() for part in parts}
    for info in (info for info in index.tensors.values() if info.name not in anew):
        module = info.name.removesuffix(".weight")
        if module != info.name and module in formats:
            pieces = _packed_entries(info, specs[module], formats[module])
        elif info.name in by_tensor:
            pieces = _table_entries(info, by_tensor[info.name])
        else:
            pieces = [Entry(info.name, info.dtype, info.shape, 0, info.num_bytes, info.name)]
        beside = (caches or {}).get(module.removesuffix(KEY_LAYER), ()) if module.endswith(KEY_LAYER) else ()
        pieces += [_entry(module.removesuffix(KEY_LAYER), part) for part in beside]
        size = sum(piece.num_bytes for piece in pieces)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(pieces)
        filled += size
    return Layout(tuple(_file_layout(_file_name(i, len(shards)), shard) for i, shard in enumerate(shards)))


def _check_sources(index: CheckpointIndex, formats: LayerFormats, specs: dict[str, LinearSpec]) -> None:
    for module, quant_format in formats.items():
        info, spec = index.tensors.get(f"{module}.weight"), specs.get(module)
        if info is None or spec is None:
            raise InputError(f"{module} is to be quantized but {index.folder} has no such linear; fix the plan")
        expected = [spec.out_features, spec.in_features]
        if list(info.shape) != (expected[::-1] if spec.transposed else expected):
            raise InputError(
                f"{info.name} has shape {list(info.shape)}; expected {expected} from the model's structure"
            )
        if info.dtype not in ("BF16", "F16", "F32"):
            raise InputError(f"{info.name} is {info.dtype}; expected BF16, F16 or F32; start from the original weights")
        if not quant_format.fits(spec.out_features, spec.in_features):
            raise InputError(
                f"{quant_format.label} does not divide the {spec.in_features} inputs of {module}; "
                "choose a smaller group size for it"
            )
        _check_scales(module, quant_format, info)


def _check_scales(module: str, quant_format: QuantFormat, info: TensorInfo) -> None:
    """Check that loaders decode a format in the dtype of the model: experts and odd scales become bfloat16."""
    if quant_format.floats is None or info.dtype == "BF16":
        return
    if quant_format.floats.scale != "model":
        raise InputError(
            f"{quant_format.label} needs a bfloat16 model, {module} is {info.dtype}: compressed-tensors decodes this "
            "format to bfloat16, and the first forward pass fails; convert the model, or use fp8 or integers"
        )
    if is_expert(module):
        raise InputError(
            f"{quant_format.label} of experts needs a bfloat16 model, {module} is {info.dtype}: transformers decodes "
            "them to bfloat16 without a word; convert the model, or use integers"
        )


def _packed_entries(info: TensorInfo, spec: LinearSpec, quant_format: QuantFormat) -> list[Entry]:
    parts = quant_format.parts(spec.out_features, spec.in_features, info.dtype)
    return [_entry(spec.name, part) for part in parts]


def _entry(name: str, part: StoredPart) -> Entry:
    return Entry(name + part.suffix, part.dtype, part.shape, 0, part.num_bytes, None)


def _table_entries(info: TensorInfo, table: EmbeddingTable) -> list[Entry]:
    rows, columns = info.shape
    scales = [Entry(name, info.dtype, (rows, 1), 0, rows * DTYPE_BYTES[info.dtype], None) for name in table.scales]
    return [Entry(info.name, "I8", (rows, columns), 0, rows * columns, None), *scales]


def _file_name(position: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{position + 1:05d}-of-{count:05d}.safetensors"


def _file_layout(name: str, entries: Sequence[Entry]) -> FileLayout:
    # Wide dtypes first keeps every tensor aligned to its element, without gaps, as the safetensors library does.
    ordered = sorted(entries, key=lambda entry: -DTYPE_BYTES[entry.dtype])
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    relative: list[int] = []
    end = 0
    for entry in ordered:
        relative.append(end)
        end += entry.num_bytes
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [relative[-1], end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = tuple(
        Entry(entry.name, entry.dtype, entry.shape, len(header) + offset, entry.num_bytes, entry.source)
        for entry, offset in zip(ordered, relative, strict=True)
    )
    return FileLayout(name, header, placed)
