"""Stored tensors of every format: back to the bit, in transformers too, and what verify finds in damaged ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.packing import pack_e2m1, unpack_e2m1
from hawqtool.export.compressed_tensors import module_format
from hawqtool.export.packed_reader import PackedReader, read_config
from hawqtool.export.stored.weights import DIVISOR, INPUT_DIVISOR, SCALE, packed_modules
from hawqtool.export.verify import verify_folder
from hawqtool.formats.activations import ACTIVATIONS
from hawqtool.formats.grids import GRIDS
from tests.support.packed_folder import linear_specs, mixed_formats, write_packed
from tests.support.tiny import tiny_llama

LABELS = (*GRIDS, "w4g32", "w3g64", *ACTIVATIONS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a folder with all formats in it."""
    place = tmp_path_factory.mktemp("stored")
    shape = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 2}
    source = tiny_llama(place / "source", layers=4, **shape)
    formats = mixed_formats(linear_specs(read_index(source)), LABELS)
    write_packed(source, place / "mixed", formats)
    return source, place / "mixed"


def config(folder: Path) -> dict[str, Any]:
    return dict(read_config(folder)["quantization_config"])


def test_pairs_of_four_bit_floats_are_packed_as_compressed_tensors_packs_them() -> None:
    bits = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.cat([bits, -bits]).repeat(3)[None].to(torch.float8_e4m3fn)
    packed = pack_e2m1(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(codes.bfloat16()))
    assert torch.equal(unpack_e2m1(packed).view(torch.uint8), codes.view(torch.uint8))


def test_every_format_loads_in_transformers_to_the_bit(folders: tuple[Path, Path]) -> None:
    source, folder = folders
    assert verify_folder(folder, source).problems == ()
    reader = PackedReader(folder)
    modules = packed_modules(reader.index)
    assert {module_format(config(folder), module).label for module in modules} == set(LABELS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model(torch.tensor([[1, 2, 3]]))  # the first pass decompresses what loading did not
    for module in modules:
        loaded, own = model.get_parameter(f"{module}.weight"), reader.tensor(f"{module}.weight")
        assert torch.equal(loaded.float(), own.float()), module
    expected = {m: a for m in modules if (a := module_format(config(folder), m).activation_format)}
    found = reader.activation_formats(modules)
    assert {m: replace(a, divisor=None) for m, a in found.items()} == expected and len(expected) > len(ACTIVATIONS)
    assert {a.divisor for a in found.values() if a.has_divisor} == {256.0}


@pytest.mark.parametrize(
    ("suffix", "damage", "words"),
    [
        (DIVISOR, lambda t: t.mul_(2), "expected equal ones"),
        (DIVISOR, lambda t: t.fill_(0), "expected a positive number"),
        (INPUT_DIVISOR, lambda t: t.mul_(2), "expected equal ones"),
        (INPUT_DIVISOR, lambda t: t.fill_(torch.nan), "expected a positive number"),
        (SCALE, lambda t: t.view(torch.uint8).fill_(0), "expected finite and non-zero"),
        (SCALE, lambda t: t.view(torch.uint8).fill_(255), "expected finite and non-zero"),
        (SCALE, lambda t: t[:, :-1].contiguous(), "for nvfp4"),
    ],
)
def test_damaged_parts_are_found(
    folders: tuple[Path, Path], tmp_path: Path, suffix: str, damage: Callable[[Tensor], Tensor], words: str
) -> None:
    folder = shutil.copytree(folders[1], tmp_path / "damaged")
    formats = {m: module_format(config(folder), m) for m in packed_modules(read_index(folder))}
    tensors = load_file(folder / "model.safetensors")
    module = next(m for m, fmt in formats.items() if fmt.grid == "nvfp4" and m + suffix in tensors)
    found = damage(tensors[module + suffix])
    tensors[module + suffix] = found.view(tensors[module + suffix].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert any(module in p and words in p for p in verify_folder(folder).problems)
