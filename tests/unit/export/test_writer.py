"""Planned bytes, written files, and that the usual libraries read them."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.checkpoint.fusion import unit_name
from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError, NumericalError
from hawqtool.export import writer as writer_module
from hawqtool.export.compressed_tensors import hits, module_format, quantization_config
from hawqtool.export.layout import plan_layout
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.writer import CheckpointWriter, copy_small_files
from hawqtool.formats import QuantFormat
from hawqtool.records import LayerFormats
from tests.support.packed_folder import linear_specs, mixed_formats, round_nearest, write_packed
from tests.support.tiny import tiny_model

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "source", layers=3)


def dense_logits(source: Path, packed: Path) -> torch.Tensor:
    """Logits of the source model whose linears hold the dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    reader = PackedReader(packed)
    state = {name: reader.tensor(name) for name in model.state_dict() if name in reader}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        return model(TOKENS).logits


def packed_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_loads_the_dequantized_weights(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_model(kind, tmp_path / "source", dtype=dtype, layers=3)
    write_packed(source, tmp_path / "out")
    assert torch.equal(packed_logits(tmp_path / "out"), dense_logits(source, tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("two words\n")["input_ids"]) == "two words\n"


@pytest.mark.parametrize("source_shards", ["5GB", "60KB"])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 40_000])
def test_shards_of_source_and_output(source_shards: str, max_shard_bytes: int, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", tie=True, max_shard_size=source_shards)
    assert (len(read_index(source).files) > 1) == (source_shards == "60KB")
    layout = write_packed(source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert (len(layout.files) > 1) == (max_shard_bytes == 40_000)
    for module in mixed_formats(linear_specs(read_index(source))):
        assert len({f.name for f in layout.files for e in f.entries if e.name.startswith(f"{module}.weight_")}) == 1
    assert torch.equal(packed_logits(tmp_path / "out"), dense_logits(source, tmp_path / "out"))


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 30_000, 1])
def test_files_are_exactly_as_planned(source: Path, max_shard_bytes: int, tmp_path: Path) -> None:
    layout = write_packed(source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert written == {file.name: file.total_bytes for file in layout.files}
    assert layout.total_bytes == sum(written.values()) == read_index(tmp_path / "out").total_bytes
    for file in layout.files:
        (length,) = struct.unpack("<Q", file.header[:8])
        assert length % 8 == 0
        assert length == len(file.header) - 8
        end = len(file.header)
        for entry in file.entries:
            assert entry.offset == end
            assert entry.offset % DTYPE_BYTES[entry.dtype] == 0
            end += entry.num_bytes
        with safe_open(tmp_path / "out" / file.name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {entry.name for entry in file.entries}
    names = ["model.safetensors"]
    if len(layout.files) > 1:
        count = len(layout.files)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        index_json = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        data = sum(e.num_bytes for f in layout.files for e in f.entries)
        assert index_json["metadata"]["total_size"] == data
        assert index_json["weight_map"] == {e.name: f.name for f in layout.files for e in f.entries}
    assert [file.name for file in layout.files] == names


def test_stored_bytes_are_the_formats_prediction(source: Path) -> None:
    index = read_index(source)
    specs = linear_specs(index)
    formats = mixed_formats(specs)
    entries = {e.name: e for f in plan_layout(index, formats, specs).files for e in f.entries}
    for name, quant_format in formats.items():
        stored = entries[f"{name}.weight_packed"].num_bytes + entries[f"{name}.weight_scale"].num_bytes
        assert stored == specs[name].stored_bytes(quant_format)
        assert entries[f"{name}.weight_shape"].num_bytes == 16
        assert f"{name}.weight" not in entries


def test_packed_reader_gives_codes_scales_and_copies(source: Path, tmp_path: Path) -> None:
    write_packed(source, tmp_path / "out")
    original, reader = TensorReader(read_index(source)), PackedReader(tmp_path / "out")
    specs = linear_specs(read_index(source))
    formats = mixed_formats(specs)
    for name in original.index.tensors:
        assert name in reader
        module = name.removesuffix(".weight")
        if module not in formats:
            assert torch.equal(reader.tensor(name), original.tensor(name))
            continue
        layer = round_nearest(module, original.tensor(name), formats[module])
        codes, scales, zeros, _ = reader.codes(module)
        assert zeros is None
        assert torch.equal(codes, layer.codes)
        assert torch.equal(scales, layer.scales)
        width = formats[module].group_width(codes.shape[1])
        assert torch.equal(reader.tensor(name), codes.to(scales.dtype) * scales.repeat_interleave(width, 1))
    assert "model.nothing.weight" not in reader
    with pytest.raises(InputError, match="model.nothing.weight is not in"):
        reader.tensor("model.nothing.weight")


def test_packed_reader_refuses_another_width_in_the_config(source: Path, tmp_path: Path) -> None:
    write_packed(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    formats = mixed_formats(linear_specs(read_index(source)))
    module = next(name for name, quant_format in formats.items() if quant_format == QuantFormat(4, 32))
    config["quantization_config"]["config_groups"]["w4g32"]["weights"]["num_bits"] = 3
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{module}.weight_packed has shape"):
        PackedReader(tmp_path / "out").tensor(f"{module}.weight")


def test_checksums_are_of_the_stored_bytes(source: Path, tmp_path: Path) -> None:
    write_packed(source, tmp_path / "out")
    checksums = json.loads((tmp_path / "out/reproduce/checksums.json").read_text())["tensors"]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert set(checksums) == set(tensors)
    for name, tensor in tensors.items():
        assert checksums[name] == hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


class Started:
    """A writer of one quantized layer, not yet written."""

    name = "model.layers.1.mlp.down_proj"

    def __init__(self, source: Path, folder: Path) -> None:
        index = read_index(source)
        self.format = QuantFormat(4, 32)
        weight = TensorReader(index).tensor(f"{self.name}.weight")
        self.layer = round_nearest(self.name, weight, self.format)
        layout = plan_layout(index, {self.name: self.format}, linear_specs(index))
        folder.mkdir()
        self.writer = CheckpointWriter(index, layout, folder)


def test_writer_misses_a_layer(source: Path, tmp_path: Path) -> None:
    started = Started(source, tmp_path / "out")
    with pytest.raises(NumericalError, match=r"3 planned .* model.layers.1.mlp.down_proj.weight_"), started.writer as w:
        w.copy_rest()


def test_writer_misses_the_rest(source: Path, tmp_path: Path) -> None:
    started = Started(source, tmp_path / "out")
    with pytest.raises(NumericalError, match="were not written"), started.writer as writer:
        writer.write_layer(started.layer)


def test_writer_refuses_a_second_copy_and_strangers(source: Path, tmp_path: Path) -> None:
    started = Started(source, tmp_path / "out")
    with started.writer as writer:
        writer.write_layer(started.layer)
        writer.copy_rest()
        with pytest.raises(NumericalError, match="down_proj.weight_packed was written twice"):
            writer.write_layer(started.layer)
        weight = torch.ones(64, 128, dtype=torch.bfloat16)
        with pytest.raises(InputError, match="up_proj.weight_packed is not in the planned layout"):
            writer.write_layer(round_nearest("model.layers.1.mlp.up_proj", weight, started.format))
        with pytest.raises(InputError, match=r"the layout has I32 \[64, 16\]"):
            writer.write_layer(round_nearest(started.name, weight, QuantFormat(3, 32)))


def test_an_error_inside_the_block_is_not_replaced(source: Path, tmp_path: Path) -> None:
    started = Started(source, tmp_path / "out")
    with pytest.raises(ZeroDivisionError), started.writer:
        raise ZeroDivisionError


def test_full_disk_and_missing_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(stream: BinaryIO, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    started = Started(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_reserve", full)
        with pytest.raises(NumericalError, match="the disk is full") as caught, started.writer:
            pass
    assert caught.value.exit_code == 5
    (tmp_path / "out/model.safetensors").unlink()
    (tmp_path / "out").rmdir()
    with pytest.raises(NumericalError, match="check that the folder exists"), started.writer:
        pass


def test_layout_refuses(source: Path) -> None:
    index = read_index(source)
    specs = linear_specs(index)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(InputError, match="model.layers.9.mlp.up_proj"):
        plan_layout(index, {"model.layers.9.mlp.up_proj": QuantFormat(4, 32)}, specs)
    with pytest.raises(InputError, match="w4g128 does not divide the 64 inputs of model.layers.0.mlp.up_proj"):
        plan_layout(index, {name: QuantFormat(4, 128)}, specs)
    with pytest.raises(InputError, match=r"has shape \[128, 64\]; expected \[64, 128\]"):
        plan_layout(index, {name: QuantFormat(4, 32)}, {name: specs["model.layers.0.mlp.down_proj"]})


def test_copies_small_files_only(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    kept = ["generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "modeling.py", "merges.txt"]
    dropped = ["config.json", "README.md", "report.json", ".gitattributes", "consolidated.00.pth", "params.bin"]
    dropped += [f"m.{e}" for e in ("safetensors", "bin", "pth", "pt", "gguf", "onnx", "h5", "msgpack", "GGUF")]
    dropped += ["model.safetensors.index.json", "pytorch_model.bin.index.json", "consolidated.safetensors"]
    (source / "original").mkdir(parents=True)
    (source / "original" / "params.json").write_text("x")
    for name in kept + dropped:
        (source / name).write_text(name)
    (source / "linked.json").symlink_to(source / "tokenizer.json")
    assert copy_small_files(source, target) == tuple(sorted([*kept, "linked.json"]))
    assert sorted(p.name for p in target.iterdir()) == sorted([*kept, "linked.json"])
    assert not (target / "linked.json").is_symlink()


def config_of(formats: LayerFormats, others: list[str]) -> dict[str, Any]:
    return quantization_config(formats, {name: unit_name(name) for name in formats}, others, {})


def test_config_groups_by_format_with_one_target_per_role() -> None:
    four, channel = QuantFormat(4, 64), QuantFormat(8, 0)
    formats = {f"model.layers.{i}.self_attn.{r}_proj": four for i in (10, 0, 3) for r in "qkv"}
    formats |= {f"model.layers.{i}.mlp.down_proj": channel for i in range(2)}
    config = config_of(formats, ["lm_head", "a.gate"])
    assert list(config["config_groups"]) == ["w4g64", "w8ch"]
    assert config["config_groups"]["w4g64"]["targets"] == [
        rf"re:.*\.layers\.(0|3|10)\.self_attn\.{role}_proj$" for role in "kqv"
    ]
    assert config["config_groups"]["w4g64"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
        "dynamic": False,
    }
    assert config["config_groups"]["w8ch"]["weights"]["strategy"] == "channel"
    assert config["config_groups"]["w8ch"]["weights"]["group_size"] is None
    assert config["ignore"] == ["a.gate", "lm_head"]
    assert all(module_format(config, name) == fmt for name, fmt in formats.items())
    assert not hits(config["config_groups"]["w8ch"]["targets"][0], "model.layers.10.mlp.down_proj")
    # Other prefixes of the same block list, as other libraries name it.
    assert hits(config["config_groups"]["w8ch"]["targets"][0], "model.language_model.layers.1.mlp.down_proj")


def test_config_of_roots_heads_and_experts() -> None:
    formats = {
        "layers.0.fc": QuantFormat(4, 32),
        "lm_head": QuantFormat(8, 32),
        "m.layers.0.experts.0.w1": QuantFormat(3, 32),
        "m.layers.1.experts.0.w1": QuantFormat(2, 32),
        "m.layers.0.experts.1.w1": QuantFormat(3, 32),
    }
    config = config_of(formats, [])
    assert all(module_format(config, name) == fmt for name, fmt in formats.items())
    assert config["config_groups"]["w3g32"]["targets"] == [r"re:.*\.layers\.0\.experts\.(0|1)\.w1$"]


def test_config_serves_a_list_with_and_without_its_prefix() -> None:
    formats = {"layers.0.fc": QuantFormat(4, 32), "layers.1.fc": QuantFormat(3, 32)}
    aliases = {name: f"model.{name}" for name in formats}
    config = quantization_config(formats, {name: name for name in formats}, [], aliases)
    assert config["config_groups"]["w4g32"]["targets"] == [r"re:(.*\.)?layers\.(0)\.fc$"]
    assert all(module_format(config, aliases[name]) == fmt for name, fmt in formats.items())


def test_config_ignores_further_matrices_that_a_target_hits() -> None:
    formats = {"model.layers.0.fc": QuantFormat(4, 32)}
    others = ["model.layers.0.fc", "mtp.layers.0.fc", "mtp.embed"]
    config = quantization_config(formats, {name: name for name in formats}, ["lm_head"], {}, others)
    assert config["ignore"] == ["lm_head", "mtp.layers.0.fc"]


def test_namesakes_in_encoder_and_decoder_have_targets_of_their_own() -> None:
    four, two = QuantFormat(4, 32), QuantFormat(2, 32)
    names = ("encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q", "decoder.block.1.layer.1.q")
    for prefix in ("", "model."):
        formats = {prefix + name: quant_format for name, quant_format in zip(names, (four, two, four), strict=True)}
        config = quantization_config(formats, {name: name for name in formats}, [], {})
        assert {name: module_format(config, name) for name in formats} == formats


def test_config_refuses_split_units_and_ambiguous_names() -> None:
    names = ("m.layers.0.self_attn.q_proj", "m.layers.0.self_attn.k_proj")
    with pytest.raises(InputError, match=r"fuse them into m.layers.0.self_attn.qkv_proj"):
        config_of(dict(zip(names, (QuantFormat(4, 32), QuantFormat(3, 32)), strict=True)), [])
    mixed = dict(zip(names, (QuantFormat(4, 32), QuantFormat(4, 32, symmetric=False)), strict=True))
    with pytest.raises(InputError, match="is w4g32a and .* is w4g32;"):
        config_of(mixed, [])
    both = {"layers.0.fc": QuantFormat(4, 32), "decoder.layers.0.fc": QuantFormat(3, 32)}
    with pytest.raises(InputError, match="ambiguous"):
        config_of(both, [])
