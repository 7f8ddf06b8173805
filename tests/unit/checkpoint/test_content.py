"""What was read of a checkpoint is compared whenever it is read again, also in parts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hawqtool.checkpoint.content import ContentRecord
from hawqtool.checkpoint.index import ExpertStack, read_index, stored_places, weights_hash
from hawqtool.checkpoint.originals.codec import stored_parts
from hawqtool.checkpoint.originals.recognition import read_original
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.checkpoint.stacked_experts import split_stacked
from hawqtool.errors import InputLostError
from tests.support.quantized_originals import quantized_pair
from tests.support.tiny import tiny_llama

STACKS = {
    "m.experts.gate_up_proj": ExpertStack("m.experts", ("gate_proj", "up_proj"), False, True, "weight"),
    "m.experts.down_proj": ExpertStack("m.experts", ("down_proj",), True, True, "weight"),
}
"""Parts that lie together in the file, and others that are columns of it."""


def quiet(_done: int, _total: int) -> None:
    pass


def flip(file: Path, byte: int) -> None:
    """Change one byte; size and time stay."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def stacked(folder: Path) -> Path:
    tensors = {"m.experts.gate_up_proj": torch.randn(3, 8, 6), "m.experts.down_proj": torch.randn(3, 6, 4)}
    save_file(tensors | {"norm": torch.ones(6)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("first", ["read", "chunks", "ahead"])
@pytest.mark.parametrize("second", ["read", "chunks"])
def test_a_change_shows_at_the_next_read(tmp_path: Path, first: str, second: str) -> None:
    index = split_stacked(replace(read_index(stacked(tmp_path)), content=ContentRecord()), STACKS)
    reader, record = TensorReader(index), index.content
    assert record is not None

    def look(how: str) -> None:
        for name in index.tensors:
            reader.tensor(name) if how == "read" else reader.raw(name)

    if first == "ahead":
        record.read([part.place for info in index.tensors.values() for part in stored_parts(info)], quiet)
    else:
        look(first)
    look(second)
    up = index.tensors["m.experts.1.up_proj.weight"]
    flip(up.file, up.start + 1)
    with pytest.raises(InputLostError, match=r"tensor m.experts.1.up_proj.weight of .* changed while the run lasted"):
        look(second)


def test_codes_and_scales_are_compared_each(tmp_path: Path) -> None:
    folder, _ = quantized_pair(tiny_llama(tmp_path / "dense"), tmp_path / "fp8", "fp8-blocks")
    index = replace(read_original(folder), content=ContentRecord())
    assert index.content is not None
    name = "model.layers.0.mlp.up_proj.weight"
    codes, scale = stored_parts(index.tensors[name])
    index.content.read([codes.place, scale.place], quiet)
    TensorReader(index).tensor(name)
    flip(scale.file, scale.start)
    with pytest.raises(InputLostError, match=scale.name):
        TensorReader(index).tensor(name)


def test_the_hash_of_weights_holds_every_byte_and_no_folder(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        stacked(tmp_path / name)

    def hashed(name: str) -> str:
        files, record = read_index(tmp_path / name).files, ContentRecord()
        record.read(stored_places(files), quiet)
        return weights_hash(files, record)

    found = [hashed("a"), hashed("b")]
    for byte in (-1, -700):
        flip(tmp_path / "b/model.safetensors", byte)
        found.append(hashed("b"))
    assert found[0] == found[1] and len(set(found)) == 3


def test_what_another_process_recorded_is_compared_with_what_was_read_meanwhile(tmp_path: Path) -> None:
    first, other, own = (tmp_path / "model.safetensors", 0, 4), (tmp_path / "model.safetensors", 4, 4), ContentRecord()
    theirs = ContentRecord()
    theirs.check(first, b"a", "x")
    theirs.check(other, b"b", "y")
    theirs.weights, theirs.files = "hash", {"config.json": "c"}
    own.check(other, b"b", "y")
    own.take_over(theirs)
    assert (own[first], own[other], own.weights, own.files) == (b"a", b"b", "hash", {"config.json": "c"})
    changed = ContentRecord()
    changed.check(other, b"another", "y")
    with pytest.raises(InputLostError, match=r"tensor at byte 4 of .*model\.safetensors changed while the run lasted"):
        changed.take_over(theirs)
