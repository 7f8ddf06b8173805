"""A quantized original as the model that it stands for: weights found by their dtypes and companions."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo, read_index
from hawqtool.checkpoint.originals.codec import Codes, DequantizedInfo, is_dequantized
from hawqtool.checkpoint.originals.declaration import FORMATS_READ, Declaration, read_declaration
from hawqtool.errors import InputError, InputLostError

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPONENTS = ("U8", "F8_E8M0")
_E2M1_BLOCK, _NVFP4_BLOCK = (1, 32), (1, 16)
_KNOWN_BLOCKS = ((128, 128), _E2M1_BLOCK)
"""Blocks of scales that are tried after those of the config."""

_SUFFIXES = ("_scale_inv", "_scale_2", "_scale", "_global_scale", "_packed", "_shape", "_zero_point", "_g_idx")
_OF_WEIGHTS = tuple(f"weight{suffix}" for suffix in _SUFFIXES)
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "input_zero_point")
_OF_CACHE = ("k_scale", "v_scale", "q_scale")
_SMOOTHING = "pre_quant_scale"


def read_original(folder: Path) -> CheckpointIndex:
    """Read the headers of a checkpoint; codes with scales are seen as the 16-bit weights that they stand for.

    A checkpoint that is not quantized is read as by `read_index`.

    Raises:
        InputError: As `read_index`; or if a float8 tensor has no scale, a scale no codes, shapes do not fit, or the
            method is none that can be read.
    """
    index = read_index(folder)
    declared = read_declaration(index.folder)
    if (index.folder / "reproduce/plan.json").is_file():
        raise InputError(f"{folder} is quantized already, by hawqtool; give the original checkpoint")
    found = Recognition(index, declared)
    if not found.weights:
        if declared.method is not None:
            raise InputError(
                f"{folder} is quantized already, its config.json says ({declared.method}), but no tensor is in a form "
                f"that is read; expected {FORMATS_READ}; if its weights are not quantized, remove quantization_config"
            )
        return index
    labels = dict.fromkeys(weight.label for weight in found.weights.values())
    return replace(index, tensors=found.tensors(), source_format=" and ".join(labels))


def left_unquantized(index: CheckpointIndex, modules: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Sets of modules that a quantized original left in 16 bits, all of each; none where the source is not quantized.

    Args:
        index: Of `read_original`.
        modules: Name of each set to its modules' stored names.
    """
    if index.source_format is None:
        return frozenset()
    dense = {name for name, info in index.tensors.items() if not is_dequantized(info)}
    return frozenset(name for name, members in modules.items() if all(f"{m}.weight" in dense for m in members))


class Recognition:
    """Weights of a checkpoint that are codes and scales, and the tensors that thereby have served.

    Args:
        index: Headers as stored.
        declared: What its config says.

    Attributes:
        weights: Name of the stored codes to the weight.
    """

    def __init__(self, index: CheckpointIndex, declared: Declaration) -> None:
        self._stored, self._declared = index.tensors, declared
        self._served: set[str] = set()
        self.weights: dict[str, DequantizedInfo] = {}
        for info in index.tensors.values():
            weight = self._weight(info)
            if weight is not None:
                self.weights[info.name] = weight
                self._served.update(part.name for part in _parts(weight))
        self._check_rest(index.tensors.values())

    def tensors(self) -> dict[str, TensorInfo]:
        """Tensors by name, without companions, file by file in the order in which safetensors would write them.

        So the output's files are those of the dequantized folder.
        """
        found: dict[str, TensorInfo] = {}
        for info in self._stored.values():
            seen = self.weights.get(info.name, info)
            if info.name in self.weights or not self._is_companion(info.name):
                if seen.name in found or (seen is not info and seen.name != info.name and seen.name in self._stored):
                    raise InputError(f"tensor {seen.name} is stored twice, also as {info.name}; expected it once")
                found[seen.name] = seen
        places = {file: place for place, file in enumerate(dict.fromkeys(info.file for info in found.values()))}
        ordered = sorted(found.values(), key=lambda i: (places[i.file], -DTYPE_BYTES[i.dtype], i.name))
        return {info.name: info for info in ordered}

    def _is_companion(self, name: str) -> bool:
        leaf = name.rpartition(".")[2]
        return name in self._served or leaf in (*_OF_ACTIVATIONS, *_OF_CACHE) or self._is_of_activations(name)

    def _is_of_activations(self, name: str) -> bool:
        """Whether a tensor scales the inputs of merged experts, as ``gate_up_proj_input_scale`` does."""
        found = (name.removesuffix(f"_{leaf}") for leaf in _OF_ACTIVATIONS if name.endswith(f"_{leaf}"))
        return any(base in self.weights for base in found)

    def _weight(self, info: TensorInfo) -> DequantizedInfo | None:
        """The weight that a stored tensor holds the codes of; None for all other tensors."""
        name = info.name
        if name.endswith("_blocks") and info.dtype == "U8" and len(info.shape) > 2:
            scale = self._get(name.removesuffix("_blocks") + "_scales")
            return None if scale is None else self._merged_mxfp4(info, scale)
        if name.endswith("_packed") and info.dtype in ("I32", "U8"):
            base = name.removesuffix("_packed")
            return self._integers(info, base) if info.dtype == "I32" else self._e2m1(info, base)
        if info.dtype in _FLOAT8 and not self._is_scale(info):
            return self._float8(info)
        scale = self._scale_of(info)
        if info.dtype == "U8" and scale is not None and scale.dtype in _FLOAT8:
            return self._e2m1(info, name)
        if info.dtype == "I8" and scale is not None:
            return self._e2m1(info, name) if scale.dtype in _EXPONENTS else self._integers(info, name)
        return None

    def _get(self, name: str) -> TensorInfo | None:
        return self._stored.get(name)

    def _scale_of(self, info: TensorInfo, base: str | None = None) -> TensorInfo | None:
        base = info.name if base is None else base
        names = [f"{base}_scale_inv", f"{base}_scale"]
        if base.endswith(".weight"):
            names.append(f"{base.removesuffix('weight')}scale")
        return next((self._stored[name] for name in names if name in self._stored), None)

    def _is_scale(self, info: TensorInfo) -> bool:
        """Whether a float8 tensor is the scale of others: NVFP4 stores them so."""
        base = info.name.removesuffix("_scale")
        return base != info.name and (base in self._stored or f"{base}_packed" in self._stored)

    def _float8(self, info: TensorInfo) -> DequantizedInfo:
        scale = self._scale_of(info)
        if scale is None:
            raise InputError(
                f"tensor {info.name} is {info.dtype} and no scale lies beside it; expected {info.name}_scale_inv or "
                f"{info.name}_scale; download the checkpoint again"
            )
        block = self._block(info, scale, info.shape, (*self._declared.blocks, *_KNOWN_BLOCKS))
        kind = "MXFP8" if scale.dtype in _EXPONENTS and block == _E2M1_BLOCK else f"FP8 {_spread(scale, info, block)}"
        label = kind + (", power-of-two scales" if scale.dtype in _EXPONENTS and not kind.startswith("MX") else "")
        return self._made(info.name, info.shape, "float8", label, info, scale, block)

    def _e2m1(self, info: TensorInfo, base: str) -> DequantizedInfo:
        shape = (*info.shape[:-1], 2 * info.shape[-1])
        scale = self._needed(self._scale_of(info, base), info, f"{base}_scale")
        if scale.dtype in _EXPONENTS:
            block = self._block(info, scale, shape, (_E2M1_BLOCK,))
            return self._made(base, shape, "e2m1", "MXFP4", info, scale, block)
        divisor, multiplier = self._get(f"{base}_global_scale"), self._get(f"{base}_scale_2")
        factor = self._needed(divisor or multiplier, info, f"{base}_global_scale or {base}_scale_2")
        block = self._block(info, scale, shape, (_NVFP4_BLOCK,))
        made = self._made(base, shape, "e2m1", "NVFP4", info, scale, block)
        return replace(made, factor=factor, divides=divisor is not None)

    def _merged_mxfp4(self, info: TensorInfo, scale: TensorInfo) -> DequantizedInfo:
        """Experts of gpt-oss: blocks of 16 bytes, rows are outputs, while the model has inputs first."""
        *lead, rows, groups, size = info.shape
        if size * 2 != _E2M1_BLOCK[1] or scale.shape != info.shape[:-1] or scale.dtype not in _EXPONENTS:
            raise InputError(f"{scale.name} is {scale.dtype} {list(scale.shape)}, which does not fit {info.name}")
        shape = (*lead, groups * 2 * size, rows)
        made = self._made(info.name.removesuffix("_blocks"), shape, "e2m1", "MXFP4", info, scale, _E2M1_BLOCK)
        return replace(made, transposed=True)

    def _integers(self, info: TensorInfo, base: str) -> DequantizedInfo:
        scale = self._needed(self._scale_of(info, base), info, f"{base}_scale")
        zeros, order = self._get(f"{base}_zero_point"), self._get(f"{base}_g_idx")
        shape, bits = info.shape, 8
        if info.dtype == "I32":
            stored = self._needed(self._get(f"{base}_shape"), info, f"{base}_shape")
            self._served.add(stored.name)
            shape = _numbers(stored)
            bits = _packed_bits(info, shape, self._declared.widths or tuple(range(2, 9)))
        if len(shape) > 2 and (zeros or order):
            raise InputError(f"{info.name} has {len(shape)} dimensions and zero points; expected one matrix each")
        width = shape[-1]
        count = scale.shape[-1] if len(scale.shape) > 1 else 1
        even = ((1, width // count),) if count and width % count == 0 else ()
        block = self._block(info, scale, shape, (*self._declared.blocks, *even))
        where = f"groups of {block[1]}" if count > 1 else _spread(scale, info, block)
        label = f"INT{bits} {where}" + (", asymmetric" if zeros else "")
        kind: Codes = "packed" if info.dtype == "I32" else "int8"
        made = self._made(base, shape, kind, label, info, scale, block)
        return replace(made, zeros=zeros, columns=order, bits=bits)

    def _needed(self, part: TensorInfo | None, info: TensorInfo, expected: str) -> TensorInfo:
        if part is None:
            raise InputError(
                f"tensor {info.name} holds codes ({info.dtype}) and no scale or shape lies beside it; expected "
                f"{expected}; download the checkpoint again"
            )
        return part

    def _made(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: Codes,
        label: str,
        codes: TensorInfo,
        scale: TensorInfo,
        block: tuple[int, int],
    ) -> DequantizedInfo:
        dtype = self._declared.dtype
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        return DequantizedInfo(name, dtype, shape, codes.file, codes.start, size, kind, label, codes, scale, block)

    def _block(
        self, info: TensorInfo, scale: TensorInfo, shape: tuple[int, ...], blocks: Iterable[tuple[int, int]]
    ) -> tuple[int, int]:
        """Rows and columns of one scale.

        Raises:
            InputError: If the shape of the scales belongs to none of the blocks.
        """
        found = scale.shape
        if scale.dtype not in (*_FLOATS, *_EXPONENTS, *_FLOAT8) or len(shape) < 2:
            raise InputError(f"{scale.name} is {scale.dtype} beside {info.name} {list(shape)}; expected float scales")
        if math.prod(found) == 1 or (len(shape) > 2 and found in (shape[:1], (*shape[:-2], 1, 1))):
            return shape[-2], shape[-1]
        if found in (shape[:1], (*shape[:-1], 1)):
            return 1, shape[-1]
        for rows, columns in blocks:
            if found == (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)):
                return rows, columns
        raise InputError(
            f"{scale.name} has shape {list(found)}, which is neither one scale for {info.name} of {list(shape)}, nor "
            "one a row, nor one a block of the sizes that config.json names; download the checkpoint again"
        )

    def _check_rest(self, stored: Iterable[TensorInfo]) -> None:
        """Refuse companions of nothing, and what changes the input of a layer."""
        for info in stored:
            leaf = info.name.rpartition(".")[2]
            if info.name in self._served:
                continue
            if leaf == _SMOOTHING:
                raise InputError(
                    f"{info.name} scales the inputs of its layer, which is not read; give the original checkpoint"
                )
            if leaf in _OF_WEIGHTS or info.dtype == "F8_E8M0":
                raise InputError(
                    f"tensor {info.name} has no quantized weight beside it to belong to; expected float8 or packed "
                    "codes; download the checkpoint again"
                )


def _parts(weight: DequantizedInfo) -> list[TensorInfo]:
    parts = (weight.codes, weight.scale, weight.factor, weight.zeros, weight.columns)
    return [part for part in parts if part is not None]


def _spread(scale: TensorInfo, info: TensorInfo, block: tuple[int, int]) -> str:
    """For how much one scale stands."""
    if len(info.shape) > 2 and math.prod(scale.shape) == info.shape[0]:
        return "per matrix"
    if math.prod(scale.shape) == 1:
        return "per tensor"
    if scale.shape in (info.shape[:1], (*info.shape[:-1], 1)):
        return "per channel"
    return f"blocks {block[0]}x{block[1]}"


def _packed_bits(info: TensorInfo, shape: tuple[int, ...], widths: Sequence[int]) -> int:
    """Width of codes in a dense bit stream, from how many words a row has.

    Raises:
        InputError: If none of the widths fits, or more than one does.
    """
    fitting = [bits for bits in widths if info.shape == (*shape[:-1], -(-shape[-1] * bits // 32))]
    if len(fitting) != 1:
        raise InputError(
            f"{info.name} has shape {list(info.shape)}, which for {list(shape)} weights fits "
            f"{' and '.join(map(str, fitting)) or 'none'} of the widths {list(widths)}; expected one; check "
            "num_bits in config.json"
        )
    return fitting[0]


def _numbers(info: TensorInfo) -> tuple[int, ...]:
    """Content of a stored shape.

    Raises:
        InputError: If it is no list of two positive integers.
    """
    code = {"I64": "q", "I32": "i"}.get(info.dtype)
    if code is None or info.shape != (2,):
        raise InputError(f"{info.name} is {info.dtype} {list(info.shape)}; expected two integers; download it again")
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            raw = stream.read(info.num_bytes)
    except OSError as error:
        raise InputLostError(f"{info.name} of {info.file} cannot be read ({error.strerror}); check the disk") from None
    if len(raw) != info.num_bytes:
        raise InputLostError(f"{info.file} ended inside tensor {info.name}; download or save it again")
    numbers = struct.unpack(f"<{info.shape[0]}{code}", raw)
    if not all(0 < number < 1 << 40 for number in numbers):
        raise InputError(f"{info.name} holds {list(numbers)}; expected positive numbers; download it again")
    return tuple(numbers)
