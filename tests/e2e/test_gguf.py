"""``--to gguf``: from a tiny model and its template to a mixed file that gguf and llama.cpp read as we do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES
from hawqtool.checkpoint.index import read_index
from hawqtool.config import load_config
from hawqtool.errors import InputError, UsageError
from hawqtool.pipeline.gguf.conversion import run_gguf
from hawqtool.pipeline.gguf.evaluation import evaluate_gguf
from hawqtool.pipeline.gguf.record import read_record, recorded_places
from hawqtool.pipeline.gguf.source import GgufSource
from hawqtool.pipeline.gguf.verification import verify_gguf
from hawqtool.report.documents import GgufDocument
from hawqtool.runtime.reporter import Silent
from tests.support import llama_cpp
from tests.support.gguf_template import permuted, write_template
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama

gguf = pytest.importorskip("gguf")

LINEARS = 14
TOKENS = list(range(3, 67))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose down projections alone have rows of 256, its template and a text."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "text.txt").write_text(random_text(1, 6000))
    (folder / "other.txt").write_text(random_text(2, 1000))
    tiny_llama(folder / "model", intermediate_size=256)
    write_template(folder / "model", folder / "t.gguf")
    return folder


def settings(place: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model": place / "model", "template": place / "t.gguf", "calibration": place / "text.txt"}
    values |= {"to": "gguf", "output": output, "num_samples": 16, "seq_len": 32, "device": "cpu"}
    values |= {"eval_samples": 4} if overrides.get("eval", True) else {}
    values = {k: str(v) if isinstance(v, Path) else v for k, v in (values | overrides).items()}
    return values | {"calibration": (values["calibration"],)}


def run(place: Path, output: Path, **overrides: Any) -> GgufDocument:
    return run_gguf(load_config(None, settings(place, output, **overrides)), Silent())


@pytest.fixture(scope="module")
def mixed(place: Path) -> tuple[Path, GgufDocument]:
    path = place / "mixed.gguf"
    return path, run(
        place,
        path,
        target_bpw=5.6,
        tensor_types=place / "types.txt",
        imatrix=place / "im.gguf",
        eval_data=place / "other.txt",
    )


def test_a_mixed_file_keeps_the_budget_and_is_what_its_record_says(mixed: tuple[Path, GgufDocument]) -> None:
    path, document = mixed
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert document["bytes"] == path.stat().st_size and document["bpw"] <= 5.6
    assert document == json.loads(path.with_name("mixed.gguf.json").read_text())
    assert len(document["types"]) == LINEARS + 2 and not document["kept"]
    assert {name: theirs[name].tensor_type.name for name in document["types"]} == document["types"]
    blocks = {name: kind for name, kind in document["types"].items() if name.startswith("blk.")}
    stored = sum(theirs[name].n_bytes for name in document["types"])
    assert document["bpw"] == pytest.approx(8 * stored / document["num_weights"])
    assert len(set(blocks.values())) > 1
    large = {name for name, kind in blocks.items() if BLOCK_TYPES[kind].block_size == 256}
    assert all("ffn_down" in name for name in large)
    assert document["rounded_to_nearest"] == [] and document["search"] is None
    kept = gguf.GGUFReader(path.with_name("t.gguf")).fields["llama.rope.freq_base"].contents()
    assert gguf.GGUFReader(path).fields["llama.rope.freq_base"].contents() == kept
    types = (path.with_name("types.txt")).read_text().splitlines()
    embedding = document["types"]["token_embd.weight"].lower()
    assert rf"^token_embd\.weight$={embedding}" in types and len(types) == LINEARS + 2


def test_the_importance_matrix_is_what_llama_quantize_reads(place: Path, mixed: tuple[Path, GgufDocument]) -> None:
    file = gguf.GGUFReader(mixed[0].with_name("im.gguf"))
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert file.fields["general.type"].contents() == "imatrix"
    assert file.fields["imatrix.datasets"].contents() and file.fields["imatrix.chunk_size"].contents() == 32
    assert len(tensors) == 2 * LINEARS
    down = tensors["blk.0.ffn_down.weight.in_sum2"]
    assert list(down.shape) == [256, 1] and bool((down.data > 0).all())
    assert tensors["blk.0.ffn_down.weight.counts"].data.item() == 16 * 32


class Told(Silent):
    """Remembers which stages began, and at what step."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, int] = {}

    @property
    def stages(self) -> set[str]:
        return set(self.first)

    def progress(self, stage: str, done: int, total: int) -> None:
        self.first.setdefault(stage, done)


class _CutAt(Silent):
    """Ends a run at a step, as a kill does."""

    def __init__(self, stage: str, done: int) -> None:
        super().__init__()
        self._at = stage, done

    def progress(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == self._at:
            raise KeyboardInterrupt


def test_a_run_that_is_cut_is_gone_on_with(
    place: Path, mixed: tuple[Path, GgufDocument], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, document = mixed
    monkeypatch.setattr("hawqtool.streaming.resume_points.LEAST_SECONDS", 0)
    damaged = False
    config = load_config(None, settings(place, tmp_path / "mixed.gguf", target_bpw=5.6, eval_data=place / "other.txt"))
    for stage, done in (("reverse sweep", 1), ("rounding", 1), ("rounding", 1)):
        with pytest.raises(KeyboardInterrupt):
            run_gguf(config, _CutAt(stage, done))
        assert not (tmp_path / "mixed.gguf").exists()
        for part in (tmp_path / ".mixed.gguf.hawqtool" / "plans").glob("*.part"):
            if not damaged:  # what was written of the first block is another thing then, and it is rounded again
                damaged = True
                data = bytearray(part.read_bytes())
                at = gguf.GGUFReader(path).tensors
                data[next(t.data_offset for t in at if t.name == "blk.0.ffn_down.weight") + 5] ^= 1
                part.write_bytes(data)
    told = Told()
    again = run_gguf(config, told)
    assert again["sha256"] == document["sha256"] and again["output_error"] == document["output_error"]
    assert not told.stages & {"forward sweep", "reverse sweep"} and told.first["rounding"] == 2
    assert {file.name for file in tmp_path.iterdir()} == {"mixed.gguf", "mixed.gguf.json"}


def test_the_smallest_file_of_a_quality_is_found(place: Path, tmp_path: Path) -> None:
    more = {"target_kl": 0.0006, "block_types": "Q4_0,Q8_0", "embedding_type": "Q8_0"}
    document = run(place, tmp_path / "kl.gguf", **more)
    search = document["search"]
    assert search is not None and search["met"] and len(search["trials"]) > 1
    chosen = next(t for t in search["trials"] if t["bpw_linears"] == document["bpw"])
    assert chosen["divergence"]["selection"] <= 0.0006
    smaller = [t for t in search["trials"] if t["stored_bytes"] < chosen["stored_bytes"]]
    assert all(t["divergence"]["selection"] > 0.0006 for t in smaller)
    assert verify_gguf(tmp_path / "kl.gguf").problems == () and len(list(tmp_path.iterdir())) == 2


def read_back(place: Path, path: Path) -> GgufSource:
    return GgufSource(path, recorded_places(path, read_record(path)), read_index(place / "model"))


def test_verify_and_evaluate_read_the_file(place: Path, mixed: tuple[Path, GgufDocument], tmp_path: Path) -> None:
    path, document = mixed
    assert verify_gguf(path, str(place / "model")).problems == ()
    config = load_config(
        None,
        {"model": str(place / "model"), "eval_data": str(place / "other.txt"), "eval_samples": 4, "seq_len": 32},
    )
    found = evaluate_gguf(config, path, Silent())
    assert document["quality"] is not None
    assert found["quantized"]["kl"] == pytest.approx(document["quality"]["quantized"]["kl"], rel=1e-3)
    copy = tmp_path / "mixed.gguf"
    shutil.copy(path.with_name("mixed.gguf.json"), tmp_path / "mixed.gguf.json")
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    copy.write_bytes(data)
    assert any("other bytes" in problem for problem in verify_gguf(copy).problems)
    tiny_llama(tmp_path / "other", intermediate_size=256, seed=1)
    assert "differs from other's by" in verify_gguf(path, str(tmp_path / "other")).problems[0]
    with pytest.raises(InputError, match="is not what was made from other"):
        evaluate_gguf(config.model_copy(update={"model": str(tmp_path / "other")}), path, Silent())


def test_rows_lie_as_llama_cpp_wants_them_and_are_read_back(place: Path, mixed: tuple[Path, GgufDocument]) -> None:
    path, document = mixed
    source = read_back(place, path)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}

    def values(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type))

    ours = source.tensor("model.layers.1.self_attn.k_proj.weight")
    assert torch.equal(permuted(ours, 2), values("blk.1.attn_k.weight"))
    down = source.tensor("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(down, values("blk.0.ffn_down.weight"))
    original = load_file(place / "model" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    assert float((down - original).square().mean() / original.square().mean()) < 0.1


def test_compensation_and_bits_lower_the_error(place: Path) -> None:
    def mean(document: GgufDocument) -> float:
        return sum(document["output_error"].values()) / LINEARS

    plain = run(place, place / "plain.gguf", block_types="Q4_1", rounding="rtn", eval=False)
    ours = run(place, place / "ours.gguf", block_types="q4_1", eval=False)
    fine = run(place, place / "fine.gguf", block_types="Q8_0", embedding_type="keep")
    assert mean(ours) < 0.9 * mean(plain) and mean(fine) < 0.01 * mean(ours)
    assert plain["bytes"] == ours["bytes"] and plain["quality"] is None
    assert fine["quality"] is not None and fine["quality"]["quantized"]["kl"] < 1e-3
    assert fine["kept"] == dict.fromkeys(("token_embd.weight", "output.weight"), "--embedding-type keep")


def test_a_size_is_kept(place: Path) -> None:
    target = 130_000
    more = {"block_types": "IQ4_NL,Q5_1,Q8_0", "quantize_lm_head": True, "eval": False, "sampled_share": 0.5}
    document = run(place, place / "size.gguf", target_size=f"{target}B", **more)
    assert target - 6000 < document["bytes"] <= target
    assert "lm_head" in document["output_error"] and document["types"]["output.weight"] in BLOCK_TYPES
    assert verify_gguf(place / "size.gguf", str(place / "model")).problems == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"template": None}, "convert_hf_to_gguf.py"),
        ({"bits": "4"}, "--bits has no effect on GGUF files yet; give --block-types instead"),
        ({"formats": "w4g64,iq4_nl"}, "iq4_nl is a block type of GGUF files; give it in --block-types"),
        ({"rounding": "foem"}, "rtn or gptq"),
        ({"block_types": "Q4_K"}, r"Q4_K does not fit blk.0.* rows of 64 .* add one of Q4_0"),
        ({}, "give --target-bpw, --target-size or --target-kl, or one of --block-types"),
        ({"target_bpw": 2.0}, r"2.000 bits per weight cannot be met: 4.\d+ to 8.500"),
        ({"output": "folder"}, "--to gguf writes one file"),
        ({"to": "compressed-tensors"}, "template is for GGUF files"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    place: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(place, overrides.pop("output", tmp_path / "no.gguf"), **overrides)
    assert not list(tmp_path.iterdir())


def test_files_of_others_have_no_record(place: Path) -> None:
    with pytest.raises(InputError, match=r"t.gguf has no record t.gguf.json beside it; expected a GGUF file that hawq"):
        verify_gguf(place / "t.gguf")


def test_a_template_of_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "other", intermediate_size=256, seed=1)
    write_template(tmp_path / "other", tmp_path / "o.gguf")
    with pytest.raises(InputError, match="holds rows of"):
        run(place, tmp_path / "no.gguf", template=tmp_path / "o.gguf", target_bpw=5)


@pytest.mark.skipif(llama_cpp.library() is None, reason="xllamacpp, which brings llama.cpp, is not installed")
def test_llama_cpp_computes_what_we_say(place: Path, mixed: tuple[Path, GgufDocument], tmp_path: Path) -> None:
    path, _ = mixed
    source, model = read_back(place, path), AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.tensor(name).float())
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)

    def compared(file: Path) -> tuple[float, float]:
        found = llama_cpp.logits(file, TOKENS).log_softmax(-1)
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        return float((expected.exp() * (expected - found)).sum(-1).mean()), float(same)

    divergence, same_top = compared(path)
    assert divergence < 0.01
    assert same_top >= 0.9
    write_template(place / "model", tmp_path / "t.gguf", permute=False)
    run(place, tmp_path / "wrong.gguf", template=tmp_path / "t.gguf", target_bpw=5.6, eval=False)
    assert compared(tmp_path / "wrong.gguf")[0] > 3 * divergence
