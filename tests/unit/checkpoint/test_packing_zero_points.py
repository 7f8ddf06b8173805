"""Zero points on disk: bytes, packing and values against compressed-tensors' own, and what verification catches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.packing import pack_codes, pack_zeros, unpack_zeros
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError, NumericalError
from hawqtool.export.compressed_tensors import module_format, quantization_config
from hawqtool.export.layout import plan_layout
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.export.writer import CheckpointWriter
from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.records import LayerFormats
from hawqtool.rounding.grid import dequantize
from tests.support.packed_folder import linear_specs, mixed_formats, round_nearest, write_packed
from tests.support.tiny import tiny_model

MIX = ("w4g32a", "w3g64a", "w8cha", "w2g32", "w5g64a", "w6cha", "w7g32a")
"""Widths 2 to 8; the one symmetric format keeps both kinds in one file."""

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "source", layers=3)


def formats_of(source: Path) -> LayerFormats:
    return mixed_formats(linear_specs(read_index(source)), MIX)


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "clean"
    write_packed(source, folder, formats_of(source))
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "out"))


def scheme_of(fmt: QuantFormat) -> QuantizationScheme:
    """compressed-tensors' own reading of the config that we write."""
    config = quantization_config({"model.layers.0.fc": fmt}, {"model.layers.0.fc": "fc"}, [], {})
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert scheme.weights is not None and scheme.weights.symmetric == fmt.symmetric
    return scheme


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, CHANNEL])
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_compressed_tensors(bits: int, group_size: int, dtype: torch.dtype) -> None:
    fmt = QuantFormat(bits, group_size, symmetric=False)
    rows, columns = 37, 192
    generator = torch.Generator().manual_seed(bits)
    groups = fmt.num_groups(columns)
    zeros, codes = (
        torch.randint(fmt.min_code, fmt.max_code + 1, size, dtype=torch.int8, generator=generator)
        for size in ((rows, groups), (rows, columns))
    )
    zeros[:2, 0] = torch.tensor([fmt.min_code, fmt.max_code], dtype=torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.01).to(dtype)
    packed = pack_zeros(zeros, bits)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert packed.shape == (-(-rows * bits // 32), groups) == (fmt.packed_zero_rows(rows), groups)
    assert torch.equal(packed, pack_to_int32(zeros, bits, packed_dim=0))
    assert torch.equal(unpack_zeros(packed, bits, rows), zeros)
    state = {
        "weight_packed": pack_codes(codes, bits),
        "weight_scale": scales,
        "weight_zero_point": packed,
        "weight_shape": torch.tensor([rows, columns]),
    }
    loaded = PackedQuantizationCompressor.decompress(state, scheme_of(fmt))["weight"]
    values = dequantize(codes, scales, zeros)
    assert values.dtype == loaded.dtype == dtype
    assert torch.equal(bits_of(values), bits_of(loaded))
    # Rounding those values (in float32, which is exact enough) on the same grid is its packing of the same checkpoint.
    exact = dequantize(codes, scales.float(), zeros)
    dense = {"weight": exact, "weight_scale": scales, "weight_zero_point": zeros}
    again = PackedQuantizationCompressor.compress(dense, scheme_of(fmt))
    assert torch.equal(again["weight_packed"], state["weight_packed"])
    assert torch.equal(again["weight_zero_point"], packed)


def test_stored_bytes_by_hand() -> None:
    # 10 rows of 4 bits are 40 bits, two words, for each of the two groups; codes and scales as without zeros.
    assert QuantFormat(4, 64, symmetric=False).stored_bytes(10, 128, 2) == 10 * (64 + 2 * 2) + 2 * 8
    assert QuantFormat(3, CHANNEL, symmetric=False).stored_bytes(33, 64, 2) == 33 * (24 + 2) + 4 * 4
    assert QuantFormat(4, 64).stored_bytes(10, 128, 2) == 10 * (64 + 2 * 2)


def test_stored_bytes_are_what_is_written(source: Path, clean: Path) -> None:
    index, formats = read_index(source), formats_of(source)
    specs = linear_specs(index)
    layout = plan_layout(index, formats, specs)
    assert layout.total_bytes == read_index(clean).total_bytes == (clean / "model.safetensors").stat().st_size
    stored = read_index(clean).tensors
    for name, fmt in formats.items():
        parts = [stored.get(f"{name}.weight_{part}") for part in ("packed", "scale", "zero_point")]
        assert (parts[2] is None) == fmt.symmetric
        assert sum(info.num_bytes for info in parts if info) == specs[name].stored_bytes(fmt)


def test_config_says_which_groups_are_asymmetric(source: Path, clean: Path) -> None:
    config = json.loads((clean / "config.json").read_text())["quantization_config"]
    kinds = {label: group["weights"]["symmetric"] for label, group in config["config_groups"].items()}
    assert kinds == {label: not label.endswith("a") for label in MIX}
    assert all(module_format(config, name) == fmt for name, fmt in formats_of(source).items())


def test_reader_gives_what_compressed_tensors_decompresses(source: Path, clean: Path) -> None:
    tensors, reader = load_file(clean / "model.safetensors"), PackedReader(clean)
    original = TensorReader(read_index(source))
    for name, fmt in formats_of(source).items():
        prefix = f"{name}."
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        loaded = PackedQuantizationCompressor.decompress(state, scheme_of(fmt))["weight"]
        assert torch.equal(bits_of(loaded), bits_of(reader.tensor(f"{name}.weight")))
        layer = round_nearest(name, original.tensor(f"{name}.weight"), fmt)
        codes, scales, zeros, _ = reader.codes(name)
        assert torch.equal(codes, layer.codes) and torch.equal(scales, layer.scales)
        assert zeros is layer.zeros is None if fmt.symmetric else torch.equal(zeros, layer.zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("labels", [*((label,) for label in MIX if label.endswith("a")), MIX])
def test_transformers_loads_it_exactly_or_refuses_it(
    labels: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """What profile transformers and README say: 5.17 loads zero points, later versions check shapes and refuse."""
    source = tiny_model("llama", tmp_path / "source", dtype=dtype, layers=3)
    write_packed(source, tmp_path / "out", mixed_formats(linear_specs(read_index(source)), labels))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error)
        assert not transformers.__version__.startswith("5.17.")
        return
    dense, reader = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval(), PackedReader(tmp_path / "out")
    state = {name: reader.tensor(name) for name in dense.state_dict() if name in reader}
    assert not dense.load_state_dict(state, strict=False).unexpected_keys
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, dense(tokens).logits)


def test_writer_wants_the_zero_points_that_were_planned(source: Path, tmp_path: Path) -> None:
    index = read_index(source)
    weight = TensorReader(index).tensor(f"{Q}.weight")
    for planned, given in ((False, True), (True, False)):
        layout = plan_layout(index, {Q: QuantFormat(4, 32, planned)}, linear_specs(index))
        target = tmp_path / str(planned)
        target.mkdir()
        expected = pytest.raises((InputError, NumericalError), match="zero_point")
        with expected, CheckpointWriter(index, layout, target) as writer:
            writer.write_layer(round_nearest(Q, weight, QuantFormat(4, 32, given)))
            writer.copy_rest()


# Verification.


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def asymmetric_module(source: Path, label: str) -> str:
    return next(name for name, fmt in formats_of(source).items() if fmt.label == label)


def problems(folder: Path, source: Path | None = None) -> str:
    return "\n".join(verify_folder(folder, source).problems)


def test_a_clean_folder_passes(clean: Path, source: Path) -> None:
    assert verify_folder(clean).problems == verify_folder(clean, source).problems == ()


def test_missing_zero_points(folder: Path, source: Path) -> None:
    module = asymmetric_module(source, "w3g64a")
    edit_tensors(folder, lambda t: t.pop(f"{module}.weight_zero_point"))
    assert f"{module}.weight_zero_point is missing; expected it: its config group" in problems(folder)


def test_zero_points_of_a_symmetric_module(folder: Path, source: Path) -> None:
    module = asymmetric_module(source, "w2g32")
    edit_tensors(folder, lambda t: t.update({f"{module}.weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}))
    assert f"{module}.weight_zero_point is stored; expected none" in problems(folder)
    with pytest.raises(InputError, match="weight_zero_point is stored; expected none"):
        PackedReader(folder).tensor(f"{module}.weight")


def test_another_kind_in_the_config(folder: Path, source: Path) -> None:
    module, config = asymmetric_module(source, "w4g32a"), folder / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["config_groups"]["w4g32a"]["weights"]["symmetric"] = True
    config.write_text(json.dumps(content))
    assert f"{module}.weight_zero_point is stored; expected none" in problems(folder)


def test_zero_points_of_another_shape_or_dtype(folder: Path, source: Path) -> None:
    module = asymmetric_module(source, "w3g64a")
    name = f"{module}.weight_zero_point"
    edit_tensors(folder, lambda t: t.update({name: t[name][:-1].contiguous()}))
    assert f"{name} has shape" in problems(folder)
    edit_tensors(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    assert f"{name} is I8; expected I32" in problems(folder)


def test_bits_behind_the_last_zero_point(tmp_path: Path) -> None:
    # 16 rows of 3 bits take 48 of 64 bits, so that there is room for stray ones.
    small = tiny_model("llama", tmp_path / "small", num_key_value_heads=1)
    module = "model.layers.0.self_attn.k_proj"
    names = [f"model.layers.0.self_attn.{role}_proj" for role in "qkv"]
    write_packed(small, tmp_path / "out", dict.fromkeys(names, QuantFormat(3, 32, symmetric=False)))
    assert verify_folder(tmp_path / "out", small).problems == ()
    edit_tensors(tmp_path / "out", lambda t: t[f"{module}.weight_zero_point"][-1].bitwise_or_(1 << 30))
    assert f"{module}.weight_zero_point has bits set behind its 16 zero points of 3 bits" in problems(tmp_path / "out")


def test_a_wrong_zero_point_is_caught_by_the_error(folder: Path, source: Path) -> None:
    module = asymmetric_module(source, "w4g32a")
    edit_tensors(folder, lambda t: t[f"{module}.weight_zero_point"][0, 0].bitwise_xor_(0b0100))
    assert f"tensor {module}.weight_zero_point differs from its SHA-256" in problems(folder)
    assert f"{module}: " in problems(folder, source)


def test_zero_points_without_codes(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.ghost.weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)}))
    assert "model.ghost.weight_zero_point has no model.ghost.weight_packed beside it" in problems(folder)
