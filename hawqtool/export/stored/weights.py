"""Stored tensors of a quantized weight: what each format makes of codes and scales, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.packing import pack_codes, pack_e2m1, pack_zeros, unpack_codes, unpack_e2m1, unpack_zeros
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.export.embedding_table import stored_tables
from hawqtool.formats import INT_QUANTIZED, QuantFormat
from hawqtool.formats.grids import WeightGrid
from hawqtool.records import RoundedLayer
from hawqtool.rounding.grid import Quantized

WEIGHT, PACKED, SCALE, ZERO_POINT = ".weight", ".weight_packed", ".weight_scale", ".weight_zero_point"
DIVISOR, INPUT_DIVISOR, SHAPE = ".weight_global_scale", ".input_global_scale", ".weight_shape"
"""Suffixes of the tensors that hold a quantized weight; which of them there are is a matter of the format."""

PARTS = (PACKED, WEIGHT, SCALE, ZERO_POINT, DIVISOR, INPUT_DIVISOR)
"""Those that count as stored bytes of a weight."""

CODE_DTYPES = ("F8_E4M3", "I8")
"""Safetensors dtypes of a ``weight`` that holds codes."""

_EXPONENT_BIAS = 127


def packed_modules(index: CheckpointIndex) -> tuple[str, ...]:
    """Modules whose weight is stored as codes, in file order."""
    found, tables = dict[str, None](), stored_tables(index)
    for info in index.tensors.values():
        if info.name.endswith(PACKED):
            found[info.name.removesuffix(PACKED)] = None
        elif info.name.endswith(WEIGHT) and info.name not in tables and is_codes(index, info.name):
            found[info.name.removesuffix(WEIGHT)] = None
    return tuple(found)


def is_codes(index: CheckpointIndex, name: str) -> bool:
    """Whether a tensor named ``weight`` holds codes that a scale beside it multiplies."""
    info = index.tensors.get(name)
    return info is not None and info.dtype in CODE_DTYPES and name.removesuffix(WEIGHT) + SCALE in index.tensors


def packed_parts(reader: TensorReader, module: str, pinned: bool = False) -> dict[str, Tensor]:
    """Codes, scales and what else there is of a module, by suffix; not ``weight_shape``."""
    names = {suffix: module + suffix for suffix in PARTS}
    return {suffix: reader.tensor(name, pinned) for suffix, name in names.items() if name in reader}


def weight_shape(reader: TensorReader, module: str, quant_format: QuantFormat) -> tuple[int, int]:
    """Rows and columns of a quantized weight whose stored tensors are those of its format."""
    if quant_format.layout == "pack-quantized":
        rows, columns = reader.tensor(module + SHAPE).tolist()
        return int(rows), int(columns)
    info = reader.index.tensors.get(module + WEIGHT)
    if info is not None:
        return info.shape[0], info.shape[1]
    packed = reader.index.tensors[module + PACKED]
    return packed.shape[0], 2 * packed.shape[1]


def packed_tensors(layer: RoundedLayer) -> dict[str, Tensor]:
    """The stored tensors of a rounded layer by name, on its device but for the shape."""
    return {f"{layer.name}{suffix}": tensor for suffix, tensor in _packed(layer).items()}


def _packed(layer: RoundedLayer) -> dict[str, Tensor]:
    fmt = layer.quant_format
    if fmt.floats is not None:
        tensors = _packed_floats(layer, fmt.floats)
        if layer.input_divisor is not None:
            tensors[INPUT_DIVISOR] = torch.full((1,), layer.input_divisor, dtype=torch.float32)
        return tensors
    if fmt.layout == INT_QUANTIZED:
        return {WEIGHT: layer.codes, SCALE: layer.scales}
    shape = torch.tensor(layer.codes.shape, dtype=torch.int64)
    tensors = {PACKED: pack_codes(layer.codes, fmt.bits), SCALE: layer.scales, SHAPE: shape}
    return tensors if layer.zeros is None else tensors | {ZERO_POINT: pack_zeros(layer.zeros, fmt.bits)}


def _packed_floats(layer: RoundedLayer, grid: WeightGrid) -> dict[str, Tensor]:
    scales = layer.scales[:: grid.group_rows].contiguous()
    codes = {WEIGHT: layer.codes} if grid.element == "e4m3" else {PACKED: pack_e2m1(layer.codes)}
    if grid.scale == "model":
        return codes | {SCALE: scales}
    if grid.scale == "e8m0":
        exponents = torch.frexp(scales.float())[1] - 1  # frexp's mantissa of a power of two is a half
        return codes | {SCALE: (exponents + _EXPONENT_BIAS).to(torch.uint8)}
    assert layer.divisor is not None  # rounding to this grid gives one
    stored = (scales.float() * layer.divisor).to(torch.float8_e4m3fn)
    return codes | {SCALE: stored, DIVISOR: scales.new_full((1,), layer.divisor, dtype=torch.float32)}


def unpack_parts(parts: Mapping[str, Tensor], quant_format: QuantFormat, shape: tuple[int, int]) -> Quantized:
    """Codes, scales, zero points and divisor of parts whose shapes and dtypes are those of their format.

    Args:
        parts: Stored tensors by suffix.
        quant_format: Their format.
        shape: Rows and columns of the weight.
    """
    if quant_format.floats is not None:
        return _unpacked_floats(parts, quant_format.floats)
    if quant_format.layout == INT_QUANTIZED:
        return Quantized(parts[WEIGHT], parts[SCALE], None)
    zeros = None if quant_format.symmetric else unpack_zeros(parts[ZERO_POINT], quant_format.bits, shape[0])
    return Quantized(unpack_codes(parts[PACKED], quant_format.bits, shape[1]), parts[SCALE], zeros)


def _unpacked_floats(parts: Mapping[str, Tensor], grid: WeightGrid) -> Quantized:
    codes = parts[WEIGHT] if grid.element == "e4m3" else unpack_e2m1(parts[PACKED])
    scales, divisor = parts[SCALE], None
    if grid.scale == "e8m0":
        exponents = scales.int() - _EXPONENT_BIAS
        scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents).bfloat16()
    elif grid.scale == "e4m3":
        divisor = float(parts[DIVISOR])
        scales = (scales.float() / divisor).bfloat16()
    return Quantized(codes, scales.repeat_interleave(grid.group_rows, dim=0), None, divisor)


def stored_problem(module: str, quant_format: QuantFormat, index: CheckpointIndex) -> str | None:
    """What is wrong with the stored tensors of a format that is no dense bit stream; None where nothing is.

    Args:
        module: Its name.
        quant_format: The format that its config group says.
        index: Headers of the checkpoint.
    """
    codes = WEIGHT if quant_format.bits == 8 else PACKED
    info = index.tensors.get(module + codes)
    if info is None or len(info.shape) != 2:
        return f"{module}{codes} is missing or no matrix; expected the codes of {quant_format.label}; write it again"
    rows, columns = info.shape[0], info.shape[1] * (1 if codes == WEIGHT else 2)
    if not quant_format.fits(rows, columns):
        return f"{module} is {rows} x {columns}; expected multiples of the groups of {quant_format.label}"
    scales = index.tensors.get(module + SCALE)
    dtype = scales.dtype if scales is not None and scales.dtype in ("BF16", "F16", "F32") else "BF16"
    wanted = {part.suffix: part for part in quant_format.parts(rows, columns, dtype)}
    for suffix in dict.fromkeys((*wanted, *PARTS, SHAPE)):
        found, part = index.tensors.get(module + suffix), wanted.get(suffix)
        if part is None and found is not None:
            return f"{module}{suffix} is stored; expected no such tensor for {quant_format.label}; write it again"
        if part is not None and (found is None or (found.dtype, tuple(found.shape)) != (part.dtype, part.shape)):
            has = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            return f"{module}{suffix} {has}; expected {part.dtype} {list(part.shape)} for {quant_format.label}"
    return None
