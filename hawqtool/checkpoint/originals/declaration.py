"""What a checkpoint's config files say of how it is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqtool.errors import InputError
from hawqtool.parsing import ParseError, load_json, shown

MODELOPT_FILE = "hf_quant_config.json"
"""Where modelopt describes its quantization, beside config.json or instead of it."""

FORMATS_READ = (
    "FP8 (quant_method fp8, compressed-tensors float-quantized, modelopt), MXFP4 (mxfp4, compressed-tensors, DeepSeek "
    "V4), NVFP4 (compressed-tensors, modelopt) and integers (compressed-tensors pack-quantized, int-quantized)"
)

_METHODS = ("fp8", "mxfp4", "compressed-tensors", "modelopt")
_FORMATS = (
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
    "dense",
)
_ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "expert_dtype")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Declaration:
    """How a checkpoint says that it is quantized; companions and dtypes of tensors decide.

    Args:
        method: ``quant_method``, None where no config names one.
        blocks: ``[rows, columns]`` of the blocks that share a scale, as far as the config tells.
        widths: Bits of integer codes, as far as the config tells.
        dtype: Safetensors name of the dtype that the model computes in.
    """

    method: str | None
    blocks: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    dtype: str


def read_declaration(folder: Path) -> Declaration:
    """Read ``config.json`` and ``hf_quant_config.json`` of a folder.

    Raises:
        InputError: If a file cannot be used, or the method or its format is none that can be read.
    """
    config = _object(folder / "config.json")
    found = next(_quantizations(config), None)
    modelopt = folder / MODELOPT_FILE
    if found is None and modelopt.is_file():
        inner = _object(modelopt).get("quantization")
        found = {"quant_method": "modelopt"} | (inner if isinstance(inner, dict) else {})
    dtype = _DTYPES.get(_dtype(config), "BF16")
    if found is None:
        return Declaration(None, (), (), dtype)
    method = found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else None)
    if method not in _METHODS:
        raise InputError(
            f"{folder} is quantized already with {_words(method, found)}, which hawqtool does not read; expected "
            f"{FORMATS_READ}; give the original checkpoint"
        )
    _check_formats(folder, method, found)
    widths = (_weights(group).get("num_bits") for group in _groups(found))
    known = tuple(dict.fromkeys(width for width in widths if type(width) is int and 2 <= width <= 8))
    return Declaration(method, tuple(dict.fromkeys(_blocks(found))), known, dtype)


def without_quantization(config: Any) -> Any:
    """A model configuration without what says that its weights are quantized, at any depth."""
    if not isinstance(config, dict):
        return config
    return {key: without_quantization(value) for key, value in config.items() if key not in _QUANTIZATION_KEYS}


def _words(method: Any, found: Mapping[str, Any]) -> str:
    details = ", ".join(f"{key} {shown(found[key])}" for key in ("bits", "group_size") if key in found)
    named = shown(method).strip("'") if method else "a method that its config.json does not name"
    return f"{named} ({details})" if details else named


def _quantizations(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Descriptions in a config and the configs inside it, the outermost first."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None and config[key] != {}:
            yield config[key] if isinstance(config[key], dict) else {"quant_method": None}
    for value in config.values():
        if isinstance(value, dict):
            yield from _quantizations(value)


def _check_formats(folder: Path, method: str, found: Mapping[str, Any]) -> None:
    """Refuse what companions do not show: sparsity, rotations, smoothing folded into activations."""
    groups = [group for group in _groups(found) if isinstance(group.get("format"), str)]
    for name in (found.get("format"), *(group["format"] for group in groups)):
        if method == "compressed-tensors" and name is not None and name not in _FORMATS:
            raise InputError(
                f"{folder} is quantized already in compressed-tensors' format {shown(name)}, which is not read; "
                f"expected {FORMATS_READ}; give the original checkpoint"
            )
    sparsity = found.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise InputError(f"{folder} is stored sparse ({shown(sparsity['format'])}); give the original checkpoint")
    if found.get("transform_config"):
        raise InputError(f"{folder} has transform_config, rotations at run time; give the original checkpoint")
    algorithm = found.get("quant_algo")
    if method == "modelopt" and algorithm is not None and algorithm not in _ALGORITHMS:
        raise InputError(
            f"{folder} is quantized already with modelopt's {shown(algorithm)}, which is not read; expected one of "
            f"{', '.join(_ALGORITHMS)}; give the original checkpoint"
        )


def _groups(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = found.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _blocks(found: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    weights = [_weights(group) for group in _groups(found)]
    for given in (found.get("weight_block_size"), *(entry.get("block_structure") for entry in weights)):
        if isinstance(given, list) and len(given) == 2 and all(type(v) is int and v > 0 for v in given):
            yield given[0], given[1]
    for size in (found.get("group_size"), *(entry.get("group_size") for entry in weights)):
        if type(size) is int and size > 0:
            yield 1, size


def _weights(group: Mapping[str, Any]) -> dict[str, Any]:
    weights = group.get("weights")
    return weights if isinstance(weights, dict) else {}


def _dtype(config: Mapping[str, Any]) -> str:
    """Name of the dtype of the model, or of the language model inside it."""
    for place in (config, config.get("text_config")):
        named = (place.get("dtype") or place.get("torch_dtype")) if isinstance(place, dict) else None
        if isinstance(named, str):
            return named.removeprefix("torch.")
    return ""


def _object(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; download it again")
    return content
