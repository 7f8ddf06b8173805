"""What `inspect` says of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hawqtool.cli.app import app
from hawqtool.pipeline.inspection.gguf import describe_gguf

gguf = pytest.importorskip("gguf")
testing = pytest.importorskip("typer.testing")


def written(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny [bold]model")
    writer.add_tensor("output_norm.weight", np.zeros(64, np.float32))
    q8, q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
    for block, kind in ((0, q8), (1, q4)):
        values = gguf.quants.quantize(np.ones((32, 64), np.float32), kind)
        writer.add_tensor(f"blk.{block}.attn_q.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_and_bits_are_counted(tmp_path: Path) -> None:
    found = describe_gguf(written(tmp_path / "m.gguf"))
    assert found["architecture"] == "llama" and found["tensors"] == 3 and found["elements"] == 64 + 2 * 2048
    assert found["bpw_matrices"] == (8.5 + 4.5) / 2
    assert found["types"]["Q8_0"] == {"tensors": 1, "elements": 2048, "bytes": 2048 * 34 // 32, "bits": 8.5}
    (only,) = found["roles"]
    assert only["role"] == "attn_q" and only["types"] == {"Q4_0": 1, "Q8_0": 1} and only["shape"] == [32, 64]


def test_the_command_shows_it(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    shown = testing.CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "attn_q" in shown.output and "Q4_0 x1, Q8_0 x1" in shown.output and "[bold]" in shown.output
    document = testing.CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert json.loads(document.stdout)["kind"] == "gguf"
    refused = testing.CliRunner().invoke(app, ["inspect", str(path), "--spectrum"])
    assert refused.exit_code == 2
    path.write_bytes(path.read_bytes()[:200])
    assert testing.CliRunner().invoke(app, ["inspect", str(path)]).exit_code == 4
