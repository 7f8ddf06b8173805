"""Every format of quantized originals against float64 arithmetic, compressed-tensors and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hawqtool.checkpoint.index import fingerprint, read_index
from hawqtool.checkpoint.originals.codec import DequantizedInfo, leading, rows_of
from hawqtool.checkpoint.originals.recognition import left_unquantized, read_original
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError
from tests.support.quantized_originals import (
    FORMATS,
    FP8_CONFIG,
    bit_stream,
    compressed,
    fp8_blocks,
    integers,
    mxfp4_bytes,
    nvfp4,
    quantized_pair,
    spread,
)
from tests.support.tiny import tiny_llama

RAGGED = {"hidden_size": 192, "intermediate_size": 320}
"""Neither is a multiple of 128; keys have 96 rows."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("dense") / "model", layers=1, **RAGGED)


def folder_of(folder: Path, tensors: dict[str, Tensor], quantization: Any = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    written = {"dtype": "bfloat16"} | config | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_the_model_it_stands_for(dense: Path, tmp_path: Path, name: str) -> None:
    quantized, plain = quantized_pair(dense, tmp_path, name)
    index, wanted = read_original(quantized), load_file(plain / "model.safetensors")
    reader = TensorReader(index)
    assert index.source_format == FORMATS[name][2]
    assert index.tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(reader.tensor(key), tensor), key
        assert index.tensors[key].shape == tuple(tensor.shape) and index.tensors[key].dtype == "BF16"
        assert reader.raw(key) == tensor.view(torch.uint8).numpy().tobytes()


def test_a_dense_checkpoint_is_read_as_it_is(dense: Path) -> None:
    assert read_original(dense) == read_index(dense)


def test_the_dtype_is_that_of_the_config(tmp_path: Path) -> None:
    parts, values = fp8_blocks(matrix(40, 130))
    tensors = {f"a{suffix}": part for suffix, part in parts.items()}
    for named, dtype in {"float16": torch.float16, "float32": torch.float32, None: torch.bfloat16}.items():
        folder = folder_of(tmp_path / str(named), tensors, FP8_CONFIG, dtype=named)
        assert torch.equal(TensorReader(read_original(folder)).tensor("a.weight"), values.to(dtype))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_every_width_and_odd_shapes(tmp_path: Path, bits: int, symmetric: bool) -> None:
    parts, values = integers(matrix(37, 72), bits, 24, symmetric)
    quantization = compressed("pack-quantized", num_bits=bits, type="int", group_size=24, symmetric=symmetric)
    folder = folder_of(tmp_path / "model", {f"a{suffix}": part for suffix, part in parts.items()}, quantization)
    assert torch.equal(TensorReader(read_original(folder)).tensor("a.weight"), values.bfloat16())


def test_groups_in_another_order_of_columns(tmp_path: Path) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts, values = integers(matrix(8, 64), 4, 32)
    codes = (values / spread(parts[".weight_scale"].double(), (8, 64), (1, 32))).round().long()
    # Columns and their groups move together.
    parts |= {".weight_packed": bit_stream(codes[:, order] + 8, 4), ".weight_g_idx": (order // 32).int()}
    tensors = {f"a{suffix}": part for suffix, part in parts.items()}
    folder = folder_of(tmp_path / "model", tensors, compressed("pack-quantized", num_bits=4, type="int", group_size=32))
    assert torch.equal(TensorReader(read_original(folder)).tensor("a.weight"), values[:, order].bfloat16())


def test_int8_channels(tmp_path: Path) -> None:
    codes, scale = matrix(6, 40).mul(40).round().to(torch.int8), matrix(6, 1).abs().bfloat16()
    folder = folder_of(tmp_path / "model", {"a.weight": codes, "a.weight_scale": scale}, compressed("int-quantized"))
    wanted = (codes.double() * scale.double()).bfloat16()
    assert torch.equal(TensorReader(read_original(folder)).tensor("a.weight"), wanted)
    assert read_original(folder).source_format == "INT8 per channel"


def test_mxfp8(tmp_path: Path) -> None:
    parts, values = fp8_blocks(matrix(6, 80), "U8", (1, 32))
    tensors = {"a.weight": parts[".weight"], "a.weight_scale": parts[".weight_scale_inv"]}
    folder = folder_of(tmp_path / "model", tensors, compressed("mxfp8-quantized", num_bits=8, group_size=32))
    assert torch.equal(TensorReader(read_original(folder)).tensor("a.weight"), values.bfloat16())
    assert read_original(folder).source_format == "MXFP8"


def test_merged_experts_in_float8(tmp_path: Path) -> None:
    found = [fp8_blocks(matrix(144, 200, seed)) for seed in range(3)]
    tensors = {
        "experts.gate_up_proj": torch.stack([parts[".weight"] for parts, _ in found]),
        "experts.gate_up_proj_scale_inv": torch.stack([parts[".weight_scale_inv"] for parts, _ in found]),
        "experts.gate_up_proj_activation_scale": torch.ones(3),
    }
    index = read_original(folder_of(tmp_path / "model", tensors, FP8_CONFIG))
    wanted = torch.stack([values.bfloat16() for _, values in found])
    reader = TensorReader(index)
    assert list(index.tensors) == ["experts.gate_up_proj"]
    assert torch.equal(reader.tensor("experts.gate_up_proj"), wanted)
    expert = leading(index.tensors["experts.gate_up_proj"], 1)
    assert torch.equal(reader.read(expert), wanted[1])
    # The halves are no whole blocks.
    assert torch.equal(reader.read(rows_of(expert, 0, 72)), wanted[1, :72])
    assert torch.equal(reader.read(rows_of(expert, 72, 72)), wanted[1, 72:])
    assert torch.equal(reader.read(rows_of(rows_of(expert, 72, 72), 60, 5)), wanted[1, 132:137])


def test_merged_experts_with_a_scale_each(tmp_path: Path) -> None:
    codes = torch.stack([matrix(5, 8, seed).to(torch.float8_e4m3fn) for seed in range(3)])
    for shape in ((3,), (3, 1, 1)):
        scale = torch.tensor([0.5, 0.25, 3.0]).reshape(shape)
        tensors = {"experts.up_proj": codes, "experts.up_proj_scale": scale}
        reader = TensorReader(read_original(folder_of(tmp_path / "model", tensors, FP8_CONFIG)))
        assert torch.equal(reader.tensor("experts.up_proj"), (codes.double() * scale.view(3, 1, 1)).bfloat16())


def gpt_oss_experts() -> tuple[dict[str, Tensor], Tensor]:
    found = [mxfp4_bytes(matrix(24, 96, seed)) for seed in range(3)]
    tensors = {
        "experts.gate_up_proj_blocks": torch.stack([packed.view(24, 3, 16) for packed, _, _ in found]),
        "experts.gate_up_proj_scales": torch.stack([stored for _, stored, _ in found]),
        "experts.gate_up_proj_bias": torch.ones(3, 24).bfloat16(),
    }
    return tensors, torch.stack([values for _, _, values in found]).transpose(1, 2)


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, values = gpt_oss_experts()
    index = read_original(folder_of(tmp_path / "model", tensors, {"quant_method": "mxfp4"}))
    reader, name = TensorReader(index), "experts.gate_up_proj"
    assert set(index.tensors) == {name, f"{name}_bias"} and index.source_format == "MXFP4"
    assert torch.equal(reader.tensor(name), values.bfloat16())
    assert torch.equal(
        reader.tensor(name), convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    )
    assert torch.equal(reader.read(leading(index.tensors[name], 2)), values[2].bfloat16())


def compressor_of(name: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(name)


@pytest.mark.parametrize("name", ["fp8-channel", "mxfp4", "nvfp4", "int4", "int3-asymmetric"])
def test_compressed_tensors_decompresses_the_same(tmp_path: Path, name: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    write, quantization, _ = FORMATS[name]
    parts = write(matrix(96, 192))[0]
    folder = folder_of(tmp_path / "model", {f"a{suffix}": part for suffix, part in parts.items()}, quantization)
    args = {k: v for k, v in quantization["config_groups"]["group_0"]["weights"].items() if k != "dynamic"}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    state = {suffix.removeprefix("."): part for suffix, part in parts.items() if "input" not in suffix}
    weight = compressor_of(quantization["format"]).decompress(state, scheme)["weight"]
    assert torch.equal(TensorReader(read_original(folder)).tensor("a.weight"), weight.bfloat16())


def test_a_second_scale_of_modelopt_multiplies(tmp_path: Path) -> None:
    (parts, values), (_, others) = nvfp4(matrix(8, 32), inverse=True), nvfp4(matrix(8, 32), inverse=False)
    folder = folder_of(tmp_path / "model", {f"a{suffix}": part for suffix, part in parts.items()})
    named = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}
    (folder / "hf_quant_config.json").write_text(json.dumps(named))
    assert torch.equal(TensorReader(read_original(folder)).tensor("a.weight"), values.bfloat16())
    assert torch.allclose(values, others, rtol=1e-6)


def test_formats_mix(tmp_path: Path) -> None:
    both = fp8_blocks(matrix(130, 96), "E8M0"), FORMATS["mxfp4-deepseek"][0](matrix(40, 64))
    tensors = {
        f"{name}{suffix}": part for name, (parts, _) in zip("ab", both, strict=True) for suffix, part in parts.items()
    }
    index = read_original(folder_of(tmp_path / "model", tensors, FP8_CONFIG, expert_dtype="fp4"))
    assert index.source_format == "FP8 blocks 128x128, power-of-two scales and MXFP4"
    assert all(isinstance(info, DequantizedInfo) for info in index.tensors.values())


def test_what_the_source_left_in_16_bits(dense: Path, tmp_path: Path) -> None:
    quantized, plain = quantized_pair(dense, tmp_path, "fp8-blocks", kept=("self_attn", "gate_proj"))
    layer = "model.layers.0"
    sets = {
        "qkv": [f"{layer}.self_attn.{part}_proj" for part in "qkv"],
        "gate_up": [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
    }
    assert left_unquantized(read_original(quantized), sets) == {"qkv"}
    assert left_unquantized(read_original(plain), sets) == frozenset()
    assert fingerprint(read_original(quantized)) == fingerprint(read_index(quantized))


GOOD = {
    "a.weight": torch.ones(8, 200).to(torch.float8_e4m3fn),
    "a.weight_scale_inv": torch.ones(1, 2),
    "b.weight": torch.ones(4, 4).bfloat16(),
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"a.weight_scale_inv": None}, "no scale lies beside it"),
        ({"b.weight_scale_inv": torch.ones(1)}, "no quantized weight beside it"),
        ({"a.weight_scale_inv": torch.ones(2, 2)}, "neither one scale"),
        ({"a.weight_scale_inv": torch.ones(1, 2).int()}, "expected float scales"),
        ({"a.pre_quant_scale": torch.ones(200)}, "scales the inputs"),
        ({"c.weight_packed": torch.ones(4, 4, dtype=torch.uint8)}, "no scale or shape lies beside it"),
        ({"c.weight_packed": torch.ones(4, 4).int(), "c.weight_scale": torch.ones(4, 1)}, "c.weight_shape"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changed: dict[str, Tensor | None], said: str) -> None:
    tensors = {name: tensor for name, tensor in (GOOD | changed).items() if tensor is not None}
    with pytest.raises(InputError, match=said):
        read_original(folder_of(tmp_path / "model", tensors, FP8_CONFIG))


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, r"awq.*\(bits 4\).*MXFP4"),
        ({"bits": 4}, "does not name"),
        (compressed("marlin-24"), "marlin-24"),
        (compressed("pack-quantized") | {"transform_config": {"a": 1}}, "rotations"),
        (compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-bitmask"}}, "stored sparse"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ"),
    ],
)
def test_other_methods_are_refused(tmp_path: Path, quantization: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_original(folder_of(tmp_path / "model", GOOD, quantization))


def test_a_declaration_without_codes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensor is in a form that is read"):
        read_original(folder_of(tmp_path / "model", {"b.weight": torch.ones(2, 2)}, {"text_config": 1} | FP8_CONFIG))
