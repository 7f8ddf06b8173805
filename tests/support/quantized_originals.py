"""Checkpoints in the published layouts of FP8, MXFP4, NVFP4 and integer originals, written by hand from dense ones.

Each writer returns the stored tensors of one matrix and what they stand for, computed here in float64.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]
"""Tensors by suffix of the module's name, and the float64 matrix that they stand for."""

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] + [-v for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
FLOAT8 = torch.float8_e4m3fn


def spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """One scale for every weight, the last blocks cut."""
    rows, columns = shape
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def block_peaks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of every block, ``[ceil(rows / b0), ceil(columns / b1)]``."""
    rows, columns = (math.ceil(extent / size) for extent, size in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1], dtype=torch.float64)
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    return padded.view(rows, block[0], columns, block[1]).amax((1, 3)).clamp_min(1e-6)


def exponents(values: Tensor) -> Tensor:
    """E8M0 bytes of the powers of two at or above values."""
    return (values.log2().ceil() + 127).to(torch.uint8)


def powers(stored: Tensor) -> Tensor:
    """Float64 value of E8M0 bytes."""
    return 2.0 ** (stored.double() - 127)


def nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest E2M1 codes, two a byte with the first low, and their values."""
    codes = (weight.unsqueeze(-1) - E2M1.double()).abs().argmin(-1)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8), E2M1.double()[codes]


def fp8_blocks(weight: Tensor, scales: str = "F32", block: tuple[int, int] = (128, 128)) -> Stored:
    """DeepSeek's layout; scales as floats, or as powers of two in float32, E8M0 or bytes."""
    wanted = block_peaks(weight, block) / 448
    stored = exponents(wanted)
    scale = wanted.float().double() if scales == "F32" else powers(stored)
    codes = (weight / spread(scale, tuple(weight.shape), block)).to(FLOAT8)
    written = {
        "F32": {".weight_scale_inv": scale.float()},
        "F32 powers": {".weight_scale_inv": scale.float()},
        "E8M0": {".scale": stored.view(torch.float8_e8m0fnu)},
        "U8": {".weight_scale_inv": stored},
    }[scales]
    return {".weight": codes, **written}, codes.double() * spread(scale, tuple(weight.shape), block)


def fp8_tensor(weight: Tensor) -> Stored:
    """Static FP8 of Mistral's models: scales without dimensions."""
    scale = (weight.abs().max() / 448).float()
    codes = (weight / scale.double()).to(FLOAT8)
    parts = {".weight": codes, ".weight_scale_inv": scale, ".activation_scale": torch.tensor(0.5)}
    return parts, codes.double() * scale.double()


def fp8_channel(weight: Tensor) -> Stored:
    """compressed-tensors' ``float-quantized``, one bfloat16 scale a row."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale.double()).clamp(-448, 448).to(FLOAT8)
    return {".weight": codes, ".weight_scale": scale, ".input_scale": torch.ones(1)}, codes.double() * scale.double()


def mxfp4_bytes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed nibbles, exponents of groups of 32, and values."""
    stored = exponents(block_peaks(weight, (1, 32)) / 6)
    scale = spread(powers(stored), tuple(weight.shape), (1, 32))
    packed, values = nibbles(weight / scale)
    return packed, stored, values * scale


def mxfp4_compressed(weight: Tensor) -> Stored:
    """compressed-tensors' ``mxfp4-pack-quantized``."""
    packed, stored, values = mxfp4_bytes(weight)
    return {".weight_packed": packed, ".weight_scale": stored}, values


def mxfp4_deepseek(weight: Tensor) -> Stored:
    """Experts of DeepSeek V4: nibbles as int8, scales as E8M0."""
    packed, stored, values = mxfp4_bytes(weight)
    return {".weight": packed.view(torch.int8), ".scale": stored.view(torch.float8_e8m0fnu)}, values


def nvfp4(weight: Tensor, inverse: bool) -> Stored:
    """NVFP4 of modelopt (``inverse``), whose second scale multiplies, or of compressed-tensors, where it divides."""
    peak = weight.abs().max()
    divisor = (448 * 6 / peak).float()
    factor = (1 / divisor.double()).float()
    known = factor.double() if inverse else 1 / divisor.double()
    stored = (block_peaks(weight, (1, 16)) / 6 / known).to(FLOAT8)
    scale = spread(stored.double() * known, tuple(weight.shape), (1, 16))
    packed, values = nibbles(weight / scale)
    if inverse:
        parts = {".weight": packed, ".weight_scale": stored, ".weight_scale_2": factor, ".input_scale": torch.ones(())}
    else:
        parts = {".weight_packed": packed, ".weight_scale": stored, ".weight_global_scale": divisor.reshape(1)}
        parts[".input_global_scale"] = torch.ones(1)
    return parts, values * scale


def bit_stream(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as a little-endian bit stream a row, in int32 words."""
    flags = (codes.unsqueeze(-1) >> torch.arange(bits)) & 1
    flags = torch.nn.functional.pad(flags.flatten(1), (0, -codes.shape[1] * bits % 32)).view(len(codes), -1, 32)
    return (flags << torch.arange(32)).sum(-1).to(torch.int32)


def integers(weight: Tensor, bits: int = 4, group: int = 32, symmetric: bool = True) -> Stored:
    """compressed-tensors' ``pack-quantized`` from 0.18 on."""
    shape, half = tuple(weight.shape), 1 << (bits - 1)
    grouped = weight.view(shape[0], -1, group)
    if symmetric:
        scale, zeros = (grouped.abs().amax(-1) / (half - 1)).bfloat16(), torch.zeros(())
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / (2 * half - 1)).bfloat16()
        zeros = (-half - low / scale.double()).round().clamp(-half, half - 1)
    wide = spread(scale.double(), shape, (1, group))
    offset = zeros if symmetric else spread(zeros, shape, (1, group))
    codes = (weight / wide + offset).round().clamp(-half, half - 1).long()
    parts = {".weight_packed": bit_stream(codes + half, bits), ".weight_scale": scale}
    parts[".weight_shape"] = torch.tensor(shape)
    if not symmetric:
        parts[".weight_zero_point"] = bit_stream((zeros.long() + half).t(), bits).t().contiguous()
    return parts, (codes - offset) * wide


def compressed(format_name: str, **weights: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors."""
    values = {"symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": values, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group}}


FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP4 = {"num_bits": 4, "type": "float"}

FORMATS: dict[str, tuple[Callable[[Tensor], Stored], dict[str, Any], str]] = {
    "fp8-blocks": (fp8_blocks, FP8_CONFIG, "FP8 blocks 128x128"),
    "fp8-odd-blocks": (
        lambda w: fp8_blocks(w, block=(48, 32)),
        FP8_CONFIG | {"weight_block_size": [48, 32]},
        "FP8 blocks 48x32",
    ),
    "fp8-powers-f32": (lambda w: fp8_blocks(w, "F32 powers"), FP8_CONFIG, "FP8 blocks 128x128"),
    "fp8-e8m0": (lambda w: fp8_blocks(w, "E8M0"), FP8_CONFIG, "FP8 blocks 128x128, power-of-two scales"),
    "fp8-u8": (lambda w: fp8_blocks(w, "U8"), FP8_CONFIG, "FP8 blocks 128x128, power-of-two scales"),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}, "FP8 per tensor"),
    "fp8-channel": (
        fp8_channel,
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        "FP8 per channel",
    ),
    "mxfp4": (mxfp4_compressed, compressed("mxfp4-pack-quantized", **FP4, group_size=32, strategy="group"), "MXFP4"),
    "mxfp4-deepseek": (mxfp4_deepseek, FP8_CONFIG, "MXFP4"),
    "nvfp4": (
        lambda w: nvfp4(w, inverse=False),
        compressed("nvfp4-pack-quantized", **FP4, group_size=16, strategy="tensor_group"),
        "NVFP4",
    ),
    "nvfp4-modelopt": (lambda w: nvfp4(w, inverse=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "int4": (
        integers,
        compressed("pack-quantized", num_bits=4, type="int", group_size=32, strategy="group"),
        "INT4 groups of 32",
    ),
    "int3-asymmetric": (
        lambda w: integers(w, 3, 32, symmetric=False),
        compressed("pack-quantized", num_bits=3, type="int", group_size=32, strategy="group", symmetric=False),
        "INT3 groups of 32, asymmetric",
    ),
}
"""Writer of a matrix, ``quantization_config`` and the words for people, by format."""


def quantized_pair(dense: Path, folder: Path, name: str, kept: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A quantized original and the dense folder that it stands for, from a dense checkpoint of one file.

    Args:
        dense: The checkpoint.
        folder: Receives ``quantized`` and ``dequantized``.
        name: Key of `FORMATS`.
        kept: Parts of names of linears that stay as they are, beside the head.
    """
    write, quantization, _ = FORMATS[name]
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in load_file(dense / "model.safetensors").items():
        stored[key] = plain[key] = tensor
        module = key.removesuffix(".weight")
        if module.endswith("_proj") and not any(part in module for part in kept):
            parts, values = write(tensor.double())
            del stored[key]
            stored |= {f"{module}{suffix}": part.contiguous() for suffix, part in parts.items()}
            plain[key] = values.to(tensor.dtype)
    for target, tensors in (("quantized", stored), ("dequantized", plain)):
        shutil.copytree(dense, folder / target)
        save_file(tensors, folder / target / "model.safetensors", metadata={"format": "pt"})
    path = folder / "quantized/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder / "quantized", folder / "dequantized"
