"""Headers of GGUF files against gguf's own writer, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hawqtool.checkpoint.gguf.header import is_gguf, read_gguf
from hawqtool.errors import InputError

gguf = pytest.importorskip("gguf")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ä", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("norm.weight", np.arange(5, dtype=np.float32))
    writer.add_tensor("a.weight", np.ones((3, 64), np.float16))
    blocks = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_names_of_gguf_files_that_are_none_are_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(tmp_path / "folder.gguf") and not is_gguf(tmp_path / "absent") and is_gguf(tmp_path / "a.gguf")
    with pytest.raises(InputError, match=r"a.gguf cannot be read \(No such file"):
        read_gguf(tmp_path / "a.gguf")


def test_headers_are_read_as_gguf_reads_them(file: Path) -> None:
    header, theirs = read_gguf(file), gguf.GGUFReader(file)
    assert is_gguf(file) and header.version == 3 and header.text("general.architecture") == "llama"
    values = {key: field.value for key, field in header.fields.items()}
    assert values["llama.block_count"] == 2 and values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.tokens"] == 3 and values["tokenizer.ggml.scores"] == 2
    assert list(header.tensors) == [t.name for t in theirs.tensors]
    for ours, other in zip(header.tensors.values(), theirs.tensors, strict=True):
        assert (ours.kind.name, ours.start, ours.num_bytes) == (
            other.tensor_type.name,
            other.data_offset,
            other.n_bytes,
        )
        assert list(ours.shape) == [int(n) for n in reversed(other.shape)]
    raw = b"".join(field.raw for field in header.fields.values())
    assert file.read_bytes()[24 : 24 + len(raw)] == raw


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, b"\x09", "GGUF version 9"),
        (8, b"\xff" * 8, "declares .* tensors"),
        (24, b"\xff" * 8, "ends inside its header"),
    ],
)
def test_damaged_headers_are_refused(file: Path, at: int, value: bytes, message: str) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_gguf(file)


def test_any_cut_is_noticed(file: Path) -> None:
    data = file.read_bytes()
    end = max(t.start + t.num_bytes for t in read_gguf(file).tensors.values())
    for size in (*range(0, end - 1, 37), end - 1):
        file.write_bytes(data[:size])
        with pytest.raises(InputError):
            read_gguf(file)
