"""`embedding_bits 8`: embedding and tied head are written in 8 bits, judged, verified, and loaded by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.report.card import model_card
from hawqtool.runtime.reporter import Silent
from tests.support.runs import place, read, settings  # noqa: F401
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind

TOKENS = torch.arange(3, 35)[None]


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_is_written_and_loads(place: Path, tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("hawqtool.pipeline.quantize.write_page", lambda *_: None)
    model, folder = tiny_llama(tmp_path / "model", tie=tied), tmp_path / "out"
    chosen = {"bits": "3", "target_bpw": 3.5, "profile": "transformers", "embedding_bits": 8}
    config = settings(place, model=model, output=folder, **chosen)
    report = run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)
    file, plan = folder / "model.safetensors", read(folder / "reproduce/plan.json")
    assert report["sizes"]["quantized_bytes"] == file.stat().st_size == plan["total_bytes"]
    assert verify_folder(folder, model).problems == ()
    loads = {entry["engine"]: entry["loads"] for entry in report["engines"]}
    assert not any(found for engine, found in loads.items() if "transformers" not in engine)
    assert "embedding: 8 bits" in model_card(report, None)
    reader = PackedReader(folder)
    assert reader.index.tensors["model.embed_tokens.weight"].dtype == "I8"
    original = TensorReader(read_index(model)).tensor("model.embed_tokens.weight").double()
    error = (reader.tensor("model.embed_tokens.weight").double() - original).abs()
    assert bool((error <= original.abs().amax(1, keepdim=True) / 127 * 0.51 + 2**-8 * original.abs()).all())
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    names = [entry["name"] for entry in report["plan"]] + ["model.embed_tokens"]
    with torch.no_grad():
        for name in names:
            expected.get_submodule(name).weight.copy_(reader.tensor(f"{name}.weight"))
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        assert torch.equal(loaded(TOKENS).logits, expected(TOKENS).logits)
    table = reader.index.tensors["model.embed_tokens.weight"]
    with file.open("r+b") as stream:
        stream.seek(table.start + 5)
        byte = stream.read(1)
        stream.seek(table.start + 5)
        stream.write(bytes([byte[0] ^ 1]))
    assert any("rounded to 8 bits" in problem for problem in verify_folder(folder, model).problems)


def test_a_table_loads_where_transformers_has_other_names(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hawqtool.pipeline.quantize.write_page", lambda *_: None)
    kind, folder = kind_named("qwen2-vl"), tmp_path / "out"
    model = save_kind(kind, tmp_path / "model")
    chosen = {"bits": "4", "rounding": "rtn", "profile": "transformers", "embedding_bits": 8}
    config = settings(place, model=model, output=folder, eval=False, eval_samples=None, **chosen)
    run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)
    assert verify_folder(folder, model).problems == ()
    loaded, reader = kind.auto_class.from_pretrained(folder, dtype="auto"), PackedReader(folder)
    loaded(TOKENS)  # unpacks all
    table = reader.tensor("model.embed_tokens.weight")
    assert "language_model" in next(name for name, _ in loaded.named_parameters() if "embed_tokens" in name)
    assert torch.equal(loaded.get_input_embeddings().weight, table)


def test_it_is_for_transformers_alone(place: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="embedding_bits 8 loads in transformers alone; give profile transformers"):
        settings(place, bits="3", target_bpw=3.5, embedding_bits=8)
