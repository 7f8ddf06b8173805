"""Reading a packed checkpoint back as if it were dense."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.errors import InputError
from hawqtool.export.compressed_tensors import module_format
from hawqtool.export.packing import unpack_codes
from hawqtool.formats import QuantFormat
from hawqtool.model.index import CheckpointIndex, read_index
from hawqtool.model.reader import TensorReader


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Weights as loaders compute them: code times scale, in the scale's dtype.

    Args:
        codes: ``[out, in]`` int8.
        scales: ``[out, groups]`` in the stored dtype.

    Returns:
        ``[out, in]`` in the scale's dtype.
    """
    rows, columns = codes.shape
    grouped = codes.to(scales.dtype).view(rows, scales.shape[1], columns // max(scales.shape[1], 1))
    return (grouped * scales.unsqueeze(-1)).view(rows, columns)


def relative_weight_error(weight: Tensor, restored: Tensor) -> float:
    """Squared error over squared weights, as ``weight_error`` of ``reproduce/checksums.json`` means it.

    Args:
        weight: ``[out, in]`` in the source's dtype.
        restored: ``[out, in]`` from `dequantize`, in the scale's dtype.
    """
    # Products round to the scale's dtype in every loader: at 8 bits that rounding is part of the error.
    error = (restored.float() - weight.float()).square().sum(-1).double().sum()
    energy = weight.float().square().sum(-1).double().sum()
    return float(error / energy.clamp_min(torch.finfo(torch.float64).tiny))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder.

    Raises:
        InputError: If it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); expected a model configuration; restore it") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object; expected a model configuration; restore it")
    return config


class PackedReader:
    """`TensorReader` over a packed checkpoint: ``M.weight`` of a packed module is dequantized on the fly.

    Args:
        folder: A written checkpoint.
        transposed: Modules whose dense weight is ``[in, out]`` in the original; their packed one is ``[out, in]``.

    Raises:
        InputError: If the folder is not a checkpoint or its config has no ``quantization_config``.
    """

    def __init__(self, folder: Path, transposed: Collection[str] = ()) -> None:
        self.transposed = transposed
        self.index: CheckpointIndex = read_index(folder)
        self._reader = TensorReader(self.index)
        config = read_config(folder).get("quantization_config")
        if not isinstance(config, dict) or not isinstance(config.get("config_groups"), dict):
            raise InputError(f"{folder}/config.json has no config_groups to unpack with; pass a packed checkpoint")
        self._config: dict[str, Any] = {"ignore": [], **config}

    def __contains__(self, name: object) -> bool:
        return name in self.index.tensors or (isinstance(name, str) and self._packed_module(name) is not None)

    def tensor(self, name: str) -> Tensor:
        """Tensor on the CPU; in the scale's dtype and as the original lies for the weight of a packed module.

        Raises:
            InputError: If there is no such tensor, or the packed tensors and the config disagree.
        """
        module = None if name in self.index.tensors else self._packed_module(name)
        if module is None:
            return self._reader.tensor(name)
        weight = dequantize(*self.codes(module))
        return weight.t().contiguous() if module in self.transposed else weight

    def codes(self, module: str) -> tuple[Tensor, Tensor]:
        """Codes ``[out, in]`` int8 and scales ``[out, groups]`` of a packed module.

        Raises:
            InputError: If the module is not packed, or shapes and the config group disagree.
        """
        packed, scales, rows, columns = self._parts(module)
        quant_format = module_format(self._config, module)
        problem = shape_problem(module, quant_format, tuple(packed.shape), tuple(scales.shape), (rows, columns))
        if problem:
            raise InputError(problem)
        return unpack_codes(packed, quant_format.bits, columns), scales

    def _packed_module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module != name and f"{module}.weight_packed" in self.index.tensors else None

    def _parts(self, module: str) -> tuple[Tensor, Tensor, int, int]:
        packed = self._reader.tensor(f"{module}.weight_packed")
        scales = self._reader.tensor(f"{module}.weight_scale")
        shape = self._reader.tensor(f"{module}.weight_shape").tolist()
        if packed.dtype != torch.int32 or not scales.dtype.is_floating_point or len(shape) != 2:
            raise InputError(f"{module} is not packed as int32 words, float scales and two dimensions; write it again")
        return packed, scales, int(shape[0]), int(shape[1])


def shape_problem(
    module: str,
    quant_format: QuantFormat,
    packed: tuple[int, ...],
    scale: tuple[int, ...],
    shape: tuple[int, int],
) -> str | None:
    """What is wrong with the shapes of a packed module in a format; None when they agree."""
    rows, columns = shape
    if not quant_format.divides(columns):
        return f"{module}.weight_shape says {columns} inputs; expected a multiple of the groups of {quant_format.label}"
    for suffix, found, expected in (
        ("weight_packed", packed, (rows, quant_format.packed_columns(columns))),
        ("weight_scale", scale, (rows, quant_format.num_groups(columns))),
    ):
        if found != expected:
            return (
                f"{module}.{suffix} has shape {list(found)}; expected {list(expected)} for {quant_format.label}, "
                f"the num_bits and group_size of its config group, and weight_shape {list(shape)}"
            )
    return None
