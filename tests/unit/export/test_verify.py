"""A clean folder passes; every kind of damage is caught and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.packing import pack_codes
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError
from hawqtool.export import packed_reader as module
from hawqtool.export.manifest import seal
from hawqtool.export.packed_reader import (
    packed_errors,
    packed_parts,
    relative_weight_error,
    unpack_parts,
)
from hawqtool.export.plausibility import half_step_bounds
from hawqtool.export.verify import VerifyReport, verify_folder
from hawqtool.formats import QuantFormat, parse_label
from hawqtool.rounding.grid import dequantize
from tests.support.packed_folder import linear_specs, mixed_formats, write_packed
from tests.support.tiny import tiny_model

LAYERS = 11
"""Enough for an unanchored index 1 to hit block 10 as well."""

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "source", layers=LAYERS)


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "clean"
    write_packed(source, folder, max_shard_bytes=400_000)
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "out"))


def reseal(folder: Path) -> None:
    """A manifest that agrees with what the folder holds: the checks below it must do without its help."""
    seal(folder, json.loads((folder / "report.json").read_text()))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    reseal(path.parent.parent if path.parent.name == "reproduce" else path.parent)


def edit_config(folder: Path, change: Callable[[Any], Any]) -> None:
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Any], checksum: bool = False) -> None:
    """Change a stored tensor in place; ``checksum`` makes the record agree."""
    info = read_index(folder).tensors[name]
    data = bytearray(info.file.read_bytes())
    view = torch.frombuffer(data, dtype=torch.uint8)[info.start : info.start + info.num_bytes]
    tensor = view.clone().view(torch_dtype(info.dtype)).view(info.shape)
    change(tensor)
    stored = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    data[info.start : info.start + info.num_bytes] = stored
    info.file.write_bytes(data)
    reseal(folder)
    if checksum:
        digest = hashlib.sha256(stored).hexdigest()
        edit_json(folder / "reproduce/checksums.json", lambda record: record["tensors"].update({name: digest}))


def label_of(source: Path, module: str) -> str:
    return mixed_formats(linear_specs(read_index(source)))[module].label


def only(report: VerifyReport, *words: str) -> None:
    """Exactly one problem, on one line, that has all the words."""
    assert len(report.problems) == 1, report.problems
    assert "\n" not in report.problems[0]
    for word in words:
        assert word in report.problems[0]


def some(report: VerifyReport, *words: str) -> None:
    """A problem that has all the words."""
    assert any(all(word in problem for word in words) for problem in report.problems), report.problems


def test_clean_folder_passes(clean: Path, source: Path) -> None:
    for against in (None, source):
        report = verify_folder(clean, against)
        assert report.problems == ()
        assert report.num_packed == 7 * LAYERS
        assert report.num_tensors == len(read_index(clean).tensors)
        assert report.total_bytes == sum(p.stat().st_size for p in clean.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_clean_folders_of_other_models_pass(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_model(kind, tmp_path / "source", dtype=dtype, tie=True)
    specs = linear_specs(read_index(source))
    write_packed(source, tmp_path / "all")
    some_only = {name: QuantFormat(4, 32) for name in specs if "down" not in name}
    write_packed(source, tmp_path / "part", some_only)
    for name in ("all", "part"):
        assert verify_folder(tmp_path / name, source).problems == ()


def test_flipped_code_bit(folder: Path) -> None:
    edit_tensor(folder, f"{Q}.weight_packed", lambda t: t[3, 1].bitwise_xor_(1 << 5))
    only(verify_folder(folder), f"tensor {Q}.weight_packed differs from its SHA-256")


def test_swapped_scales(folder: Path) -> None:
    edit_tensor(folder, f"{Q}.weight_scale", lambda t: t[:2].copy_(t[:2].flip(0).clone()))
    only(verify_folder(folder), f"tensor {Q}.weight_scale differs from its SHA-256")


def test_changed_copy(folder: Path, source: Path) -> None:
    name = "model.layers.2.input_layernorm.weight"
    edit_tensor(folder, name, lambda t: t[:1].mul_(2), checksum=True)
    assert verify_folder(folder).problems == ()
    only(verify_folder(folder, source), f"tensor {name} differs from the source's")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_changed_num_bits(folder: Path, source: Path, bits: int) -> None:
    label = label_of(source, DOWN)
    other = 8 if bits != 8 else 7
    if parse_label(label).bits != bits:
        other = bits
    edit_config(folder, lambda c: c["config_groups"][label]["weights"].update(num_bits=other))
    some(verify_folder(folder), f"{DOWN}.weight_packed has shape", "num_bits")


def test_changed_group_size(folder: Path, source: Path) -> None:
    module = next(n for n, f in mixed_formats(linear_specs(read_index(source))).items() if f.group_size == 32)
    label = label_of(source, module)
    edit_config(folder, lambda c: c["config_groups"][label]["weights"].update(group_size=16))
    some(verify_folder(folder), f"{module}.weight_scale has shape", "group_size")


def test_dropped_ignore(folder: Path) -> None:
    edit_config(folder, lambda c: c["ignore"].remove("lm_head"))
    only(verify_folder(folder), "linear lm_head is not in ignore")


def test_packed_module_in_ignore(folder: Path) -> None:
    edit_config(folder, lambda c: c["ignore"].append(Q))
    some(verify_folder(folder), f"packed module {Q} is hit by ignore")


def test_unanchored_target(folder: Path, source: Path) -> None:
    label = label_of(source, DOWN)

    def change(config: Any) -> None:
        # Block 1 gets a target without an end: it hits block 10 too, which another target already names.
        for group in config["config_groups"].values():
            for place, target in enumerate(group["targets"]):
                if target.endswith(r"mlp\.down_proj$"):
                    indices = target.split("(")[1].split(")")[0].split("|")
                    rest = [i for i in indices if i != "1"] or ["999"]
                    group["targets"][place] = target.replace("|".join(indices), "|".join(rest))
        config["config_groups"][label]["targets"].append(r"re:model\.layers\.1")

    edit_config(folder, change)
    report = verify_folder(folder)
    some(report, r"re:model\.layers\.1", "not anchored", "it also hits model.layers.10.")
    some(report, "model.layers.10.mlp.down_proj is hit by", "disjoint")


def test_unanchored_target_names_what_it_hits_wrongly(folder: Path, source: Path) -> None:
    label = label_of(source, DOWN)

    def change(config: Any) -> None:
        targets = config["config_groups"][label]["targets"]
        place = next(i for i, target in enumerate(targets) if r"mlp\.down_proj" in target)
        targets[place] = targets[place].removesuffix("$")

    edit_config(folder, change)
    only(verify_folder(folder), r"mlp\.down_proj of group", "not anchored")


def test_class_name_target(folder: Path, source: Path) -> None:
    edit_config(folder, lambda c: c["config_groups"][label_of(source, DOWN)]["targets"].append("Linear"))
    report = verify_folder(folder)
    some(report, "target Linear", "not anchored")
    some(report, f"{Q} is hit by", "disjoint")


def test_module_in_no_group(folder: Path, source: Path) -> None:
    label = label_of(source, DOWN)
    edit_config(
        folder,
        lambda c: c["config_groups"][label].update(
            targets=[t.replace("1|", "").replace("(1)", "(999)") for t in c["config_groups"][label]["targets"]]
        ),
    )
    some(verify_folder(folder), f"packed module {DOWN} is hit by no group")


def test_target_that_hits_a_dense_matrix(folder: Path, source: Path) -> None:
    label = label_of(source, DOWN)
    edit_config(folder, lambda c: c["config_groups"][label]["targets"].append(r"re:.*embed_tokens$"))
    only(verify_folder(folder), "model.embed_tokens.weight is not packed but hit by")


def test_frozen_status(folder: Path) -> None:
    edit_config(folder, lambda c: c.update(quantization_status="frozen"))
    only(verify_folder(folder), "'frozen'", "wrong weights silently")


@pytest.mark.parametrize(("key", "value"), [("quant_method", "gptq"), ("format", "mixed-precision"), ("format", None)])
def test_top_fields(folder: Path, key: str, value: str | None) -> None:
    edit_config(folder, lambda c: c.update({key: value}))
    only(verify_folder(folder), key, repr(value))


def test_group_fields(folder: Path, source: Path) -> None:
    label = label_of(source, DOWN)
    edit_config(folder, lambda c: c["config_groups"][label].update(format="int-quantized"))
    only(verify_folder(folder), f"config group {label}", "int-quantized")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_compression_ratio", 2.0),
        ("transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
        ("run_compressed", True),
    ],
)
def test_keys_that_are_never_written(folder: Path, key: str, value: object) -> None:
    edit_config(folder, lambda c: c.update({key: value}))
    only(verify_folder(folder), key, "remove it")


@pytest.mark.parametrize(("key", "value"), [("actorder", "group"), ("zp_dtype", "int8"), ("observer", "mse")])
def test_keys_of_weights_that_are_never_written(folder: Path, source: Path, key: str, value: object) -> None:
    label = label_of(source, DOWN)
    edit_config(folder, lambda c: c["config_groups"][label]["weights"].update({key: value}))
    only(verify_folder(folder), f"weights of config group {label} has {key}")
    edit_config(folder, lambda c: c["config_groups"][label]["weights"].update({key: None}))
    assert verify_folder(folder).problems == ()


def test_ignore_of_a_module_that_does_not_exist(folder: Path) -> None:
    edit_config(folder, lambda c: c["ignore"].append("model.router"))
    only(verify_folder(folder), "ignore names model.router, which is no unquantized linear")


@pytest.mark.parametrize("key", ["symmetric", "type", "dynamic", "strategy"])
def test_weights_fields(folder: Path, source: Path, key: str) -> None:
    label = label_of(source, DOWN)
    edit_config(folder, lambda c: c["config_groups"][label]["weights"].pop(key))
    some(verify_folder(folder), f"config group {label}:")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("config_groups"),
        lambda c: c.update(config_groups={}),
        lambda c: c.update(config_groups=[1]),
        lambda c: c.update(config_groups={"a": 1}),
        lambda c: c.update(config_groups={"a": {"targets": "x", "weights": {}}}),
        lambda c: c.update(config_groups={"a": {"targets": ["x"]}}),
        lambda c: c.update(config_groups={"a": {"targets": ["re:("], "weights": {}}}),
        lambda c: c.update(config_groups={"a": {"targets": [], "weights": {}}}),
        lambda c: c.pop("ignore"),
        lambda c: c.update(ignore=[1]),
    ],
)
def test_broken_structure_is_a_problem_not_a_crash(folder: Path, change: Callable[[Any], Any]) -> None:
    edit_config(folder, change)
    assert verify_folder(folder).problems


def test_unquantized_model(source: Path) -> None:
    with pytest.raises(InputError, match="neither a packed layer nor reproduce/plan.json"):
        verify_folder(source)


def test_split_fused_set(source: Path, tmp_path: Path) -> None:
    formats = {name: QuantFormat(4, 32) for name in linear_specs(read_index(source))}
    formats[Q] = QuantFormat(8, 32)
    write_packed(source, tmp_path / "out", formats, split_units=True)
    only(verify_folder(tmp_path / "out", source), "fused set model.layers.1.self_attn.qkv_proj", f"{Q} w8g32")


def test_fused_set_packed_in_part(source: Path, tmp_path: Path) -> None:
    formats = {name: QuantFormat(4, 32) for name in linear_specs(read_index(source))}
    del formats["model.layers.1.mlp.up_proj"]
    write_packed(source, tmp_path / "out", formats)
    only(verify_folder(tmp_path / "out"), "fused set model.layers.1.mlp.gate_up_proj", "up_proj unpacked")


def test_one_scale_too_large_is_caught_by_the_error_alone(folder: Path, source: Path) -> None:
    edit_tensor(folder, f"{Q}.weight_scale", lambda t: t[5, -1].mul_(1.5), checksum=True)
    assert verify_folder(folder).problems == ()
    only(verify_folder(folder, source), f"{Q}: relative squared weight error")


def test_a_weight_without_a_recorded_error(folder: Path, source: Path) -> None:
    edit_json(folder / "reproduce/checksums.json", lambda record: record["weight_error"].pop(Q))
    assert verify_folder(folder).problems == ()
    only(verify_folder(folder, source), f"{Q} has no weight_error")


def forge(folder: Path, source: Path, module: str, change: Callable[[Tensor], Any], part: str) -> None:
    """Change a packed module and all records of it, as someone would who knows them."""
    edit_tensor(folder, f"{module}{part}", change, checksum=True)
    fmt = mixed_formats(linear_specs(read_index(source)))[module]
    weight = TensorReader(read_index(source)).tensor(f"{module}.weight")
    parts = packed_parts(TensorReader(read_index(folder)), module)
    error = packed_errors(weight, parts, fmt, torch.device("cpu")).relative
    edit_json(folder / "reproduce/checksums.json", lambda record: record["weight_error"].update({module: error}))
    assert verify_folder(folder).problems == ()


@pytest.mark.parametrize("layer", range(7))
@pytest.mark.parametrize("role", ["self_attn.q_proj", "mlp.down_proj"])
def test_random_codes_with_forged_records(folder: Path, source: Path, layer: int, role: str) -> None:
    """At every width: the cycle of formats meets all seven."""
    module = f"model.layers.{layer}.{role}"
    fmt = mixed_formats(linear_specs(read_index(source)))[module]

    def change(packed: Tensor) -> None:
        columns = 128 if "down" in role else 64
        codes = torch.randint(fmt.min_code, fmt.max_code + 1, (len(packed), columns), dtype=torch.int8)
        packed.copy_(pack_codes(codes, fmt.bits))

    forge(folder, source, module, change, ".weight_packed")
    only(verify_folder(folder, source), f"{module}: the module has relative squared weight error", "at most")


def test_one_wrong_group_with_forged_records(folder: Path, source: Path) -> None:
    forge(folder, source, DOWN, lambda t: t[5, -1].mul_(-1), ".weight_scale")
    only(verify_folder(folder, source), f"{DOWN}: row 5 has" if label_of(source, DOWN)[-2:] == "ch" else f"{DOWN}: row")


def test_one_zeroed_row_with_forged_records(folder: Path, source: Path) -> None:
    module = next(n for n, f in mixed_formats(linear_specs(read_index(source))).items() if f.bits == 4)
    forge(folder, source, module, lambda t: t[5].mul_(1e-6), ".weight_scale")
    only(verify_folder(folder, source), f"{module}: row 5")


NORM = "model.norm.weight"


def learned(folder: Path, change: Callable[[Tensor], Any]) -> None:
    """A norm's gain that is recorded as learned, in a run that trained."""
    edit_tensor(folder, NORM, change, checksum=True)
    edit_json(folder / "reproduce/checksums.json", lambda record: record.update(changed=[NORM]))
    edit_json(folder / "report.json", lambda report: report.update(config={"refine_steps": 8}))


def test_learned_gains(folder: Path, source: Path) -> None:
    learned(folder, lambda t: t.mul_(1.05))
    assert verify_folder(folder, source).problems == ()
    edit_json(folder / "report.json", lambda report: report.update(config={"refine_steps": 0}))
    only(verify_folder(folder), f"{NORM} is recorded as learned, but report.json has no training steps")


@pytest.mark.parametrize("change", [lambda t: t.zero_(), lambda t: t.mul_(2), lambda t: t[:1].mul_(-1)])
def test_gains_that_no_training_gives(folder: Path, source: Path, change: Callable[[Tensor], Any]) -> None:
    learned(folder, change)
    assert verify_folder(folder).problems == ()
    only(verify_folder(folder, source), f"tensor {NORM} is recorded as learned and differs by")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_bad_scale(folder: Path, value: float) -> None:
    edit_tensor(folder, f"{Q}.weight_scale", lambda t: t[5, 0].fill_(value), checksum=True)
    only(verify_folder(folder), f"{Q}.weight_scale has {value} at row 5, group 0")


def test_other_weight_shape(folder: Path) -> None:
    edit_tensor(folder, f"{DOWN}.weight_shape", lambda t: t.copy_(t.flip(0).clone()), checksum=True)
    only(verify_folder(folder), DOWN, "weight_shape")


def test_records(folder: Path) -> None:
    plan = folder / "reproduce/plan.json"
    edit_json(plan, lambda p: p["layers"][0].update(bytes=1))
    only(verify_folder(folder), "bytes; reproduce/plan.json says 1")
    edit_json(plan, lambda p: p["layers"].pop(0))
    only(verify_folder(folder), "is packed but not in reproduce/plan.json")
    edit_json(plan, lambda p: p.update(total_bytes=5))
    some(verify_folder(folder), "reproduce/plan.json says 5")
    plan.write_text("{}")
    reseal(folder)
    only(verify_folder(folder), "reproduce/plan.json does not have the expected fields")
    plan.write_text("{")
    reseal(folder)
    only(verify_folder(folder), "reproduce/plan.json is not readable JSON")
    plan.unlink()
    reseal(folder)
    only(verify_folder(folder), "reproduce/plan.json is missing")
    (folder / "reproduce/checksums.json").unlink()
    reseal(folder)
    some(verify_folder(folder), "reproduce/checksums.json is missing")


def test_plan_with_another_format(folder: Path) -> None:
    edit_json(folder / "reproduce/plan.json", lambda p: p["layers"][0].update(bits=1 + p["layers"][0]["bits"]))
    only(verify_folder(folder), "reproduce/plan.json says w")


def test_other_linear_missing_from_ignore(folder: Path) -> None:
    edit_json(folder / "reproduce/plan.json", lambda p: p["other_linears"].append("model.router"))
    only(verify_folder(folder), "linear model.router is not in ignore")


def test_unrecorded_and_missing_tensors(folder: Path) -> None:
    record = folder / "reproduce/checksums.json"
    edit_json(record, lambda r: r["tensors"].update(ghost=r["tensors"].pop("model.norm.weight")))
    report = verify_folder(folder)
    some(report, "tensor model.norm.weight is not in reproduce/checksums.json")
    some(report, "tensor ghost of reproduce/checksums.json is missing")


def test_against_another_model(folder: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path / "other", layers=LAYERS - 1, intermediate_size=192)
    report = verify_folder(folder, other)
    some(report, "config.json has num_hidden_layers 11; the source has 10")
    some(report, f"{DOWN}.weight_shape is [64, 128]", "[64, 192]")
    some(report, "model.layers.10.mlp.down_proj is packed but", "not in the source")
    some(report, "tensor model.layers.10.input_layernorm.weight is not in the source")
    wide = tiny_model("qwen2", tmp_path / "wide", layers=LAYERS)
    some(verify_folder(folder, wide), "self_attn.q_proj.bias of the source is missing")


def test_unreadable_input_raises(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        verify_folder(tmp_path / "absent")
    with pytest.raises(InputError):
        verify_folder(folder, tmp_path / "absent")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        verify_folder(folder)


@pytest.mark.parametrize("weights", [1, 500, 1 << 20])
def test_errors_of_a_few_rows_at_a_time_are_those_of_the_whole(
    source: Path, clean: Path, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE_WEIGHTS", {"cpu": weights})
    reader, original = TensorReader(read_index(clean)), TensorReader(read_index(source))
    for name, fmt in mixed_formats(linear_specs(read_index(source))).items():
        weight, parts = original.tensor(f"{name}.weight"), packed_parts(reader, name)
        restored = dequantize(*unpack_parts(parts, fmt, (len(weight), weight.shape[1])))
        found = packed_errors(weight, parts, fmt, torch.device("cpu"))
        assert found.relative == relative_weight_error(weight, restored)
        assert torch.equal(found.bound, half_step_bounds(weight, fmt))
