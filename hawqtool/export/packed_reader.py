"""Reading a packed checkpoint back as if it were dense."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.checkpoint.index import CheckpointIndex, read_index
from hawqtool.checkpoint.packing import unpack_codes, unpack_zeros
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError
from hawqtool.export.compressed_tensors import module_format
from hawqtool.export.embedding_table import restored_table, stored_tables
from hawqtool.export.plausibility import half_step_bounds, scale_multiples
from hawqtool.export.stored.cache import cache_scales
from hawqtool.export.stored.weights import (
    INPUT_DIVISOR,
    PACKED,
    SCALE,
    ZERO_POINT,
    is_codes,
    packed_parts,
    stored_problem,
    unpack_parts,
    weight_shape,
)
from hawqtool.formats import PACK_QUANTIZED, QuantFormat
from hawqtool.formats.activations import ActivationFormat
from hawqtool.parsing import ParseError, load_json
from hawqtool.rounding.grid import Quantized, dequantize

_SLICE_WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Weights that are compared at a time: on a CPU, intermediates of more leave its cache, which takes twice as long."""


def relative_weight_error(weight: Tensor, restored: Tensor) -> float:
    """Squared error over squared weights, as ``weight_error`` of ``reproduce/checksums.json`` means it.

    Args:
        weight: ``[out, in]`` in the source's dtype.
        restored: ``[out, in]`` from `dequantize`, in the scale's dtype.
    """
    original = weight.float()
    squares = torch.stack([(restored.float() - original).square_(), original.square()])
    return _ratio([squares.sum(-1).double()])


@dataclass(frozen=True)
class PackedErrors:
    """How a packed module differs from the source's weight.

    Args:
        relative: As `relative_weight_error`.
        error: Squared error per scale, ``[out, groups]`` float32.
        energy: Squared weights per scale, ``[out, groups]`` float32.
        multiple: From `scale_multiples`, ``[out, groups]`` float32.
        bound: From `half_step_bounds`, ``[out, groups]`` float32.
    """

    relative: float
    error: Tensor
    energy: Tensor
    multiple: Tensor
    bound: Tensor


def packed_errors(
    weight: Tensor, parts: Mapping[str, Tensor], quant_format: QuantFormat, device: torch.device
) -> PackedErrors:
    """Errors of a packed module, a few rows at a time.

    Args:
        weight: ``[out, in]`` in the source's dtype.
        parts: From `packed_parts`, without `shape_problem`.
        quant_format: Their format.
        device: Where to compute.
    """
    rows, columns = weight.shape
    whole = None if quant_format.layout == PACK_QUANTIZED else unpack_parts(parts, quant_format, (rows, columns))
    zeros = None if quant_format.symmetric else unpack_zeros(parts[ZERO_POINT], quant_format.bits, rows)
    together = 1 if quant_format.floats is None else quant_format.floats.group_rows  # rows that share a scale
    step = max(1, _SLICE_WEIGHTS.get(device.type, 1 << 20) // max(columns * together, 1)) * together
    scales = parts[SCALE] if whole is None else whole.scales
    groups = scales.shape[1]
    found, by_scale = [], []
    for start in range(0, max(rows, 1), step):
        some = slice(start, start + step)
        if whole is None:
            codes = unpack_codes(parts[PACKED][some].to(device), quant_format.bits, columns)
        else:
            codes = whole.codes[some].to(device)
        shifts = None if zeros is None else zeros[some].to(device)
        restored = dequantize(codes, scales[some].to(device), shifts).float()
        original = weight[some].to(device).float()
        # Products round to the scale's dtype in every loader: at 8 bits that rounding is part of the error.
        squares = torch.stack([(restored - original).square_(), original.square()])
        found.append(squares.sum(-1).double())
        error, energy = squares.view(2, len(original), groups, -1).sum(-1)
        multiple = scale_multiples(original, restored, error, energy, quant_format.bits)
        bound = half_step_bounds(original, quant_format)
        by_scale.append(torch.stack([error, energy, multiple, bound]).cpu())
    return PackedErrors(_ratio(found), *torch.cat(by_scale, 1))


def _ratio(rows: list[Tensor]) -> float:
    """Of squared errors and squared weights by row, ``[2, rows]`` float64 each."""
    error, energy = torch.cat(rows, 1).sum(1)
    return float(error / energy.clamp_min(torch.finfo(torch.float64).tiny))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder.

    Raises:
        InputError: If it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is not readable JSON ({error}); expected a model configuration; restore it") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object; expected a model configuration; restore it")
    return config


class PackedReader:
    """`TensorReader` over a packed checkpoint: ``M.weight`` of a packed module is dequantized on the fly.

    Args:
        folder: A written checkpoint.
        transposed: Modules whose dense weight is ``[in, out]`` in the original; their packed one is ``[out, in]``.
        device: Where codes are unpacked, and lie then.

    Raises:
        InputError: If the folder is not a checkpoint or its config has no ``quantization_config``.
    """

    def __init__(self, folder: Path, transposed: Collection[str] = (), device: torch.device | str = "cpu") -> None:
        self.transposed, self._device = transposed, device
        self.index: CheckpointIndex = read_index(folder)
        self._reader = TensorReader(self.index)
        config = read_config(folder).get("quantization_config")
        if not isinstance(config, dict) or not isinstance(config.get("config_groups"), dict):
            raise InputError(f"{folder}/config.json has no config_groups to unpack with; pass a packed checkpoint")
        self._config: dict[str, Any] = {"ignore": [], **config}
        self._tables = stored_tables(self.index)

    def __contains__(self, name: object) -> bool:
        return name in self.index.tensors or (isinstance(name, str) and self._packed_module(name) is not None)

    def tensor(self, name: str, pinned: bool = False) -> Tensor:
        """Tensor on the CPU; a packed weight on the reader's device, in the scale's dtype, as the original lies.

        What lies on the CPU, if only on its way, is page-locked where ``pinned``.

        Raises:
            InputError: If there is no such tensor, or the packed tensors and the config disagree.
        """
        if name in self._tables:
            parts = (self._reader.tensor(part, pinned) for part in (name, self._tables[name].scales[0]))
            return restored_table(*(part.to(self._device, non_blocking=pinned) for part in parts))
        module = None if name in self.index.tensors and not is_codes(self.index, name) else self._packed_module(name)
        if module is None:
            return self._reader.tensor(name, pinned)
        weight = dequantize(*self.codes(module, pinned))
        return weight.t().contiguous() if module in self.transposed else weight

    def codes(self, module: str, pinned: bool = False) -> Quantized:
        """Codes, scales, zero points and divisor of a packed module, as `dequantize` takes them.

        Raises:
            InputError: If the module is not packed, or shapes and the config group disagree.
        """
        quant_format = module_format(self._config, module)
        if quant_format.layout != PACK_QUANTIZED:
            problem = stored_problem(module, quant_format, self.index)
            if problem:
                raise InputError(problem)
            parts = packed_parts(self._reader, module, pinned)
            stored = {suffix: part.to(self._device, non_blocking=True) for suffix, part in parts.items()}
            return unpack_parts(stored, quant_format, weight_shape(self._reader, module, quant_format))
        parts = self._parts(module, pinned)
        found = {suffix: tuple(part.shape) for suffix, part in parts.items()}
        problem = shape_problem(module, quant_format, found, self._shape(module))
        if problem:
            raise InputError(problem)
        return unpack_parts(parts, quant_format, self._shape(module))

    def _packed_module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        packed = f"{module}{PACKED}" in self.index.tensors or is_codes(self.index, name)
        return module if module != name and packed else None

    def activation_formats(self, modules: Iterable[str]) -> dict[str, ActivationFormat]:
        """How engines round the inputs of packed modules, for those where they do.

        Raises:
            InputError: If the packed tensors and the config disagree.
        """
        if not any(group.get("input_activations") for group in self._config["config_groups"].values()):
            return {}
        packed = (module for module in modules if self._packed_module(f"{module}.weight"))
        found = {module: module_format(self._config, module).activation_format for module in packed}
        return {m: self._calibrated(m, activations) for m, activations in found.items() if activations is not None}

    def _calibrated(self, module: str, activations: ActivationFormat) -> ActivationFormat:
        """A format with what is stored of it for a module."""
        if not activations.has_divisor:
            return activations
        name = module + INPUT_DIVISOR
        if name not in self._reader:
            raise InputError(f"{name} is missing; expected it for inputs in {activations.name}; write it again")
        return replace(activations, divisor=float(self._reader.tensor(name)))

    def cache_scales(self) -> dict[str, Tensor]:
        """Scales of the KV cache by the names of their tensors; none where it stays in 16 bits."""
        return cache_scales(self.index) if self._config.get("kv_cache_scheme") else {}

    def _parts(self, module: str, pinned: bool) -> dict[str, Tensor]:
        parts = packed_parts(self._reader, module, pinned)
        floating = parts[SCALE].dtype.is_floating_point
        if not floating or any(part.dtype != torch.int32 for suffix, part in parts.items() if suffix != SCALE):
            raise InputError(f"{module} is not packed as int32 words and float scales; write it again")
        return {suffix: part.to(self._device, non_blocking=pinned) for suffix, part in parts.items()}

    def _shape(self, module: str) -> tuple[int, int]:
        shape = self._reader.tensor(f"{module}.weight_shape").tolist()
        if len(shape) != 2:
            raise InputError(f"{module}.weight_shape does not hold two numbers; write it again")
        return int(shape[0]), int(shape[1])


def shape_problem(
    module: str, quant_format: QuantFormat, found: Mapping[str, tuple[int, ...]], shape: tuple[int, int]
) -> str | None:
    """What is wrong with the shapes of a packed module in a format; None when they agree.

    Args:
        module: Its name.
        quant_format: The format that its config group says.
        found: Shapes of the stored parts by suffix; zero points are absent where none are stored.
        shape: Content of ``weight_shape``.
    """
    rows, columns = shape
    if not quant_format.divides(columns):
        return f"{module}.weight_shape says {columns} inputs; expected a multiple of the groups of {quant_format.label}"
    if quant_format.symmetric and ZERO_POINT in found:
        return f"{module}{ZERO_POINT} is stored; expected none: its config group says symmetric true; write it again"
    if not quant_format.symmetric and ZERO_POINT not in found:
        return f"{module}{ZERO_POINT} is missing; expected it: its config group says symmetric false; write it again"
    groups = quant_format.num_groups(columns)
    wanted = {PACKED: (rows, quant_format.packed_columns(columns)), SCALE: (rows, groups)}
    wanted[ZERO_POINT] = (quant_format.packed_zero_rows(rows), groups)
    for suffix, size in found.items():
        if size != wanted[suffix]:
            return (
                f"{module}{suffix} has shape {list(size)}; expected {list(wanted[suffix])} for {quant_format.label}, "
                f"the num_bits and group_size of its config group, and weight_shape {list(shape)}"
            )
    return None
