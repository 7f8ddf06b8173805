"""Names that safetensors gives to dtypes, their sizes, and the torch dtypes that correspond."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hawqtool.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
"""Bytes of one element, by safetensors name."""

_TORCH_NAMES = {
    "F64": "float64",
    "I64": "int64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


def torch_dtype(name: str) -> torch.dtype:
    """Torch dtype of a safetensors dtype name.

    Raises:
        InputError: If the name is not one that can be read.
    """
    # Imported here so that reading headers (dry runs, help) never pays for torch.
    import torch

    if name not in _TORCH_NAMES:
        raise InputError(f"dtype {name} cannot be read; expected one of {', '.join(DTYPE_BYTES)}")
    dtype = getattr(torch, _TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors name of a torch dtype.

    Raises:
        InputError: If safetensors has no such dtype.
    """
    wanted = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH_NAMES.items():
        if torch_name == wanted:
            return name
    raise InputError(f"dtype {dtype} cannot be stored; expected one of {', '.join(_TORCH_NAMES.values())}")
