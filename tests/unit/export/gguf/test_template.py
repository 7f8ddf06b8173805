"""Matching by rows, and files written from a template, read by gguf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hawqtool.checkpoint.gguf.block_codec import dequantize_blocks, pack_blocks
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES
from hawqtool.checkpoint.gguf.header import read_gguf
from hawqtool.errors import NumericalError
from hawqtool.export.gguf.template import match_template, read_tensor
from hawqtool.export.gguf.writer import GgufWriter, plan_gguf
from hawqtool.rounding.blocks.block_search import search_blocks

gguf = pytest.importorskip("gguf")


def swapped(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query projection as llama.cpp has them."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def sources() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    made = {name: torch.randn(16, 64, generator=random).bfloat16() for name in ("q", "o", "e.0", "e.1", "lost")}
    made["embed"] = torch.randn(40, 64, generator=random).bfloat16()
    made["embed"][7:11] = made["embed"][3]
    return made


@pytest.fixture
def template(tmp_path: Path, sources: dict[str, torch.Tensor]) -> Path:
    tensors = {
        "token_embd.weight": sources["embed"],
        "blk.0.attn_q.weight": swapped(sources["q"], 2),
        "blk.0.attn_output.weight": sources["o"],
        "blk.0.ffn_up_exps.weight": torch.stack([sources["e.1"], sources["e.0"]]),
        "blk.0.strange.weight": sources["lost"].flip(1),
    }
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(32)
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("output_norm.weight", np.arange(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "t.gguf"


def test_rows_find_their_tensors(template: Path, sources: dict[str, torch.Tensor]) -> None:
    header = read_gguf(template)
    shapes = {name: (t.shape[0], t.shape[1]) for name, t in sources.items()}
    found = match_template(header, shapes, sources.__getitem__, torch.bfloat16)
    assert {name: [piece.source for piece in match.pieces] for name, match in found.items()} == {
        "token_embd.weight": ["embed"],
        "blk.0.attn_q.weight": ["q"],
        "blk.0.attn_output.weight": ["o"],
        "blk.0.ffn_up_exps.weight": ["e.1", "e.0"],
    }
    for name, match in found.items():
        values = read_tensor(header, header.tensors[name]).view(len(match.pieces), -1, 64)
        for matrix, piece in zip(values, match.pieces, strict=True):
            source = sources[piece.source]
            assert torch.equal(source if piece.rows is None else source[piece.rows], matrix)
    assert found["blk.0.attn_q.weight"].pieces[0].rows is not None
    assert found["blk.0.attn_output.weight"].pieces[0].rows is None
    one_off = {**sources, "o": sources["o"].clone()}
    one_off["o"][3, 5] += 1
    assert "blk.0.attn_output.weight" not in match_template(header, shapes, one_off.__getitem__, torch.bfloat16)


def test_a_written_file_has_the_planned_size_and_gguf_reads_it(
    template: Path, tmp_path: Path, sources: dict[str, torch.Tensor]
) -> None:
    header, path = read_gguf(template), tmp_path / "out.gguf"
    q4, q8 = BLOCK_TYPES["Q4_0"], BLOCK_TYPES["Q8_0"]
    layout = plan_gguf(header, {"blk.0.attn_output.weight": q4, "blk.0.ffn_up_exps.weight": q8})
    ones = torch.ones(64)
    stored = pack_blocks(search_blocks(sources["o"].float(), ones, q4), q4)
    experts = [pack_blocks(search_blocks(sources[name].float(), ones, q8), q8) for name in ("e.1", "e.0")]
    with GgufWriter(header, layout, path) as writer:
        writer.write("blk.0.attn_output.weight", stored)
        for number, expert in enumerate(experts):
            writer.write("blk.0.ffn_up_exps.weight", expert, 16 * number)
    assert path.stat().st_size == layout.total_bytes and not path.with_name("out.gguf.part").exists()
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert theirs["blk.0.attn_output.weight"].tensor_type.name == "Q4_0"
    values = gguf.quants.dequantize(theirs["blk.0.attn_output.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(values), dequantize_blocks(stored, q4))
    assert theirs["blk.0.ffn_up_exps.weight"].data.shape == (2, 16, 68)
    before = {t.name: t for t in gguf.GGUFReader(template).tensors}
    kept = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.strange.weight", "output_norm.weight")
    assert all(np.array_equal(theirs[name].data, before[name].data) for name in kept)
    again = read_gguf(path)
    assert again.fields["tokenizer.ggml.tokens"] == header.fields["tokenizer.ggml.tokens"]
    assert again.fields["general.file_type"].value == 32 and again.fields["general.quantization_version"].value == 2


def test_a_tensor_left_out_leaves_no_file(template: Path, tmp_path: Path) -> None:
    header, path = read_gguf(template), tmp_path / "out.gguf"
    layout = plan_gguf(header, {"blk.0.attn_output.weight": BLOCK_TYPES["Q4_0"]})
    with pytest.raises(NumericalError, match="attn_output.weight was not written"), GgufWriter(header, layout, path):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["t.gguf"]
