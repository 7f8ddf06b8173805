"""Reading headers: what a good checkpoint gives, and which bad ones are refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hawqtool.checkpoint.dtypes import DTYPE_BYTES, dtype_name, torch_dtype
from hawqtool.checkpoint.index import CheckpointIndex, fingerprint, read_index
from hawqtool.checkpoint.reader import CHUNK_BYTES, TensorReader
from hawqtool.checkpoint.source import resolve_model
from hawqtool.errors import InputError
from tests.support.tiny import tiny_model


def write_raw(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def checkpoint(folder: Path, header: Any, data: bytes) -> None:
    (folder / "config.json").write_text("{}")
    write_raw(folder / "model.safetensors", header, data)


def sharded(folder: Path, weight_map: Any, **files: dict[str, Any]) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, header in files.items():
        size = max((e["data_offsets"][1] for e in header.values()), default=0)
        write_raw(folder / f"{name}.safetensors", header, bytes(size))


F32 = {"a": entry("F32", [2], 0, 8)}

BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: write_raw(f / "model.safetensors", F32, bytes(8)), "no config.json"),
    "nothing": (lambda f: (f / "config.json").write_text("{}"), "no model.safetensors"),
    "empty file": (
        lambda f: [(f / "config.json").write_text("{}"), (f / "model.safetensors").write_bytes(b"abc")],
        "has 3 bytes",
    ),
    "huge header": (
        lambda f: [
            (f / "config.json").write_text("{}"),
            (f / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
        ],
        "declares a header of 1099511627776 bytes",
    ),
    "header past end": (
        lambda f: [
            (f / "config.json").write_text("{}"),
            (f / "model.safetensors").write_bytes(struct.pack("<Q", 100) + b"{}"),
        ],
        "declares a header of 100 bytes in a file of 10",
    ),
    "not json": (lambda f: checkpoint(f, b"{nope", b""), "is not JSON"),
    "not utf-8": (lambda f: checkpoint(f, b'{"\xff": 1}', b""), "is not JSON"),
    "a list": (lambda f: checkpoint(f, [], b""), "not a JSON object"),
    "no dtype": (lambda f: checkpoint(f, {"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "dtype None"),
    "no offsets": (lambda f: checkpoint(f, {"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "a in .* is malformed"),
    "negative shape": (lambda f: checkpoint(f, {"a": entry("F32", [-1], 0, 4)}, bytes(4)), "malformed"),
    "bool shape": (lambda f: checkpoint(f, {"a": entry("F32", [True], 0, 4)}, bytes(4)), "malformed"),
    "unknown dtype": (lambda f: checkpoint(f, {"a": entry("F4", [2], 0, 1)}, bytes(1)), "has dtype F4"),
    "size": (lambda f: checkpoint(f, {"a": entry("F32", [3], 0, 8)}, bytes(8)), "spans 8 bytes; expected 12"),
    "truncated": (lambda f: checkpoint(f, F32, bytes(7)), "is truncated"),
    "trailing": (lambda f: checkpoint(f, F32, bytes(9)), "bytes after its last tensor"),
    "overlap": (lambda f: checkpoint(f, {**F32, "b": entry("F32", [2], 4, 12)}, bytes(12)), "b of .* overlaps"),
    "gap": (lambda f: checkpoint(f, {**F32, "b": entry("F32", [1], 12, 16)}, bytes(16)), "b of .* leaves a gap"),
    "twice": (
        lambda f: checkpoint(f, b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""),
        "names a twice",
    ),
    "a name with escapes": (lambda f: checkpoint(f, {"a\x1b[2J": F32["a"]}, bytes(8)), r"names a tensor a\\x1b\[2J"),
    "a name that turns the line": (lambda f: checkpoint(f, {"a\u202e": F32["a"]}, bytes(8)), "all of them printable"),
    "an endless name": (lambda f: checkpoint(f, {"a" * 1001: F32["a"]}, bytes(8)), "at most 1000 characters"),
    "many dimensions": (lambda f: checkpoint(f, {"a": entry("U8", [1] * 65, 0, 1)}, bytes(1)), "malformed"),
    "huge extent": (lambda f: checkpoint(f, {"a": entry("U8", [2**63, 0], 0, 0)}, b""), "malformed"),
    "huge offset": (lambda f: checkpoint(f, {"a": entry("U8", [1], 0, 2**64)}, bytes(1)), "malformed"),
    "product beyond numbers": (
        lambda f: checkpoint(f, {"a": entry("U8", [2**62] * 64, 0, 1)}, bytes(1)),
        "spans 1 bytes; expected",
    ),
    "past the end": (lambda f: checkpoint(f, {"a": entry("U8", [9], 0, 9)}, bytes(1)), "is truncated"),
    "starts late": (lambda f: checkpoint(f, {"a": entry("U8", [1], 8, 9)}, bytes(9)), "leaves a gap"),
    "deep header": (lambda f: checkpoint(f, b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}", b""), "inside each other"),
    "endless number": (lambda f: checkpoint(f, b'{"a":' + b"9" * 9999 + b"}", b""), "4300"),
    "dtype with escapes": (lambda f: checkpoint(f, {"a": entry("\x1b[2J", [1], 0, 1)}, bytes(1)), r"dtype \\x1b"),
    "dtype is a list": (lambda f: checkpoint(f, {"a": entry([], [1], 0, 1)}, bytes(1)), r"dtype \[\]"),
    "index names a key twice": (
        lambda f: [
            (f / "config.json").write_text("{}"),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors", "a": "y"}}'),
        ],
        "names a twice",
    ),
    "shard is a pickle": (lambda f: sharded(f, {"a": "pytorch_model.bin"}), "name of a safetensors file"),
    "missing shard": (lambda f: sharded(f, {"a": "x.safetensors"}), "x.safetensors, which is missing"),
    "shard outside": (lambda f: sharded(f, {"a": "../x.safetensors"}), "without a path"),
    "shard absolute": (lambda f: sharded(f, {"a": "/x.safetensors"}), "without a path"),
    "shard backslash": (lambda f: sharded(f, {"a": "..\\x.safetensors"}), "without a path"),
    "shard dots": (lambda f: sharded(f, {"a": ".."}), "without a path"),
    "no map": (lambda f: sharded(f, None), "no weight_map"),
    "empty map": (lambda f: sharded(f, {}), "no weight_map"),
    "two homes": (
        lambda f: sharded(
            f, {"a": "x.safetensors", "b": "y.safetensors"}, x=F32, y={**F32, "b": entry("U8", [1], 8, 9)}
        ),
        "a is in both x.safetensors and y.safetensors",
    ),
    "index disagrees": (
        lambda f: sharded(f, {"a": "y.safetensors", "b": "x.safetensors"}, x=F32, y={"b": F32["a"]}),
        "places tensor a in y.safetensors, but x.safetensors holds it",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    build, message = BAD[case]
    build(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_index(tmp_path)
    assert "\n" not in str(caught.value)


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_index(tmp_path / "absent")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_says_that_pickles_are_never_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="never loaded"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (("adapter_config.json",), "it holds an adapter"),
        (("model-Q4_K.gguf",), "it holds a GGUF file"),
        (("snapshots/0a/config.json",), "give a folder in it, such as .*snapshots/0a"),
        (("text/config.json",), "give a folder in it, such as .*text"),
        (("config.json", "model-00001-of-00002.safetensors"), "one of these two beside 1 of another name"),
        (("other.txt",), "check the path"),
    ],
)
def test_says_what_a_folder_without_a_checkpoint_holds(names: tuple[str, ...], advice: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=advice):
        read_index(tmp_path)


def linked(folder: Path, outside: Path, name: str) -> Path:
    """A checkpoint in which one file is a link to where it was moved."""
    tiny_model("llama", folder)
    outside.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = linked(tmp_path / "model", tmp_path / "elsewhere", name)
    for read in (read_index, lambda model: resolve_model(str(model))):
        with pytest.raises(InputError, match=f"{name} is a link that leaves the folder") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_entries_that_are_no_files_are_refused(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(InputError, match=r"generation_config\.json is a pipe, socket or device"):
        read_index(folder)
    (folder / "generation_config.json").unlink()
    for target in ("nothing", "generation_config.json"):  # dangling, and in a circle
        (folder / "generation_config.json").symlink_to(target)
        with pytest.raises(InputError, match="is a link that leads nowhere"):
            resolve_model(str(folder))
        (folder / "generation_config.json").unlink()
    read_index(folder)


def test_links_of_a_hub_cache_and_within_the_folder_work(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--tiny"
    folder = linked(cache / "snapshots/abc", cache / "blobs", "model.safetensors")
    (folder / "LICENSE").write_text("terms")
    (folder / "COPYING").symlink_to("LICENSE")
    (tmp_path / "by link").symlink_to(folder)
    same_as_library(read_index(folder))
    assert resolve_model(str(tmp_path / "by link")).folder == tmp_path / "by link"
    for target in ("../../../outside", "../../refs/main", "circle"):
        (folder / "circle").unlink(missing_ok=True)
        (folder / "circle").symlink_to(target)
        with pytest.raises(InputError, match="circle is a link that lea(ves|ds nowhere)"):
            read_index(folder)


def test_an_index_may_name_what_no_shard_holds(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "x.safetensors", "gone": "x.safetensors"}, x=F32)
    assert list(read_index(tmp_path).tensors) == ["a"]


def same_as_library(index: CheckpointIndex) -> None:
    expected = {name: t for file in index.files for name, t in load_file(file).items()}
    reader = TensorReader(index)
    assert set(index.tensors) == set(expected)
    for name, tensor in expected.items():
        found = reader.tensor(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert found.view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.dim() else found == tensor
        assert len(reader.raw(name)) == index.tensors[name].num_bytes


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_reads_what_the_library_reads(shard_size: str, tmp_path: Path) -> None:
    index = read_index(tiny_model("llama", tmp_path, max_shard_size=shard_size))
    assert (len(index.files) > 1) == (shard_size != "5GB")
    assert index.total_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    order = [(index.files.index(info.file), info.start) for info in index.tensors.values()]
    assert order == sorted(order)
    same_as_library(index)


def test_reads_every_dtype_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).to(torch_dtype(name)).view(2, 3) for name in DTYPE_BYTES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    same_as_library(read_index(tmp_path))
    for name in DTYPE_BYTES:
        assert dtype_name(torch_dtype(name)) == name
        assert torch.empty(0, dtype=torch_dtype(name)).element_size() == DTYPE_BYTES[name]


def test_tensor_owns_its_memory_and_chunks_are_small(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5 << 20, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = TensorReader(read_index(tmp_path))
    assert [len(piece) for piece in reader.chunks("a")] == [CHUNK_BYTES, (20 << 20) - CHUNK_BYTES]
    first = reader.tensor("a")
    first.zero_()
    assert reader.tensor("a")[7] == 7
    assert "a" in reader
    with pytest.raises(InputError, match="tensor b is not in"):
        reader.tensor("b")


def test_fingerprint_sees_config_headers_and_sizes(tmp_path: Path) -> None:
    def build(folder: str, config: str, tensors: dict[str, torch.Tensor]) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config)
        save_file(tensors, tmp_path / folder / "model.safetensors")
        return fingerprint(read_index(tmp_path / folder))

    first = build("1", "{}", {"a": torch.zeros(2)})
    assert build("2", "{}", {"a": torch.zeros(2)}) == first
    assert build("3", "{ }", {"a": torch.zeros(2)}) != first
    assert build("4", "{}", {"b": torch.zeros(2)}) != first
    assert build("5", "{}", {"a": torch.zeros(3)}) != first
