"""What the heap gives back, and matrices that streams share."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import load_config
from hawqtool.pipeline.run.job import prepare
from hawqtool.runtime import malloc as heap
from hawqtool.streaming.converted import WeightSource
from tests.support.tiny import tiny_llama


def test_another_c_library_has_nothing_to_release(monkeypatch: pytest.MonkeyPatch) -> None:
    heap.release_freed_pages()
    monkeypatch.setattr(heap, "_trim", None)
    heap.release_freed_pages()


def test_streams_share_matrices_outside_the_blocks_while_they_live(tmp_path: Path) -> None:
    job = prepare(load_config(None, {"model": str(tiny_llama(tmp_path / "m")), "device": "cpu", "group_size": 32}))
    first, second = job.stream(), job.stream()
    embeddings = [stream.model.get_input_embeddings().weight for stream in (first, second)]
    assert embeddings[0].data_ptr() == embeddings[1].data_ptr()
    # Gains are changed by distillation, and another dtype is another tensor.
    assert first.model.model.norm.weight is not second.model.model.norm.weight
    double = job.stream(dtype=torch.float64).model.get_input_embeddings().weight
    assert torch.equal(double.float(), embeddings[0])
    del first, second, embeddings, double
    gc.collect()
    assert not job.matrices


def test_a_head_that_is_quantized_is_not_shared(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", tie=False)
    settings = {"model": str(folder), "device": "cpu", "group_size": 32, "quantize_lm_head": True}
    job = prepare(load_config(None, settings))
    heads = [stream.model.get_output_embeddings().weight for stream in (job.stream(), job.stream())]
    assert heads[0].data_ptr() != heads[1].data_ptr()


class Edited:
    """The checkpoint with one number of one tensor changed."""

    def __init__(self, source: WeightSource, name: str) -> None:
        self.source, self.name = source, name

    def tensor(self, name: str) -> torch.Tensor:
        value = self.source.tensor(name)
        if name == self.name:
            value = value.clone()
            value.view(-1)[-1] += 1
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.source


def test_another_source_shares_a_matrix_only_where_it_has_the_same(tmp_path: Path) -> None:
    job = prepare(load_config(None, {"model": str(tiny_llama(tmp_path / "m")), "device": "cpu", "group_size": 32}))
    own = job.stream()
    shared = own.model.get_input_embeddings().weight
    same = job.stream(TensorReader(job.index)).model.get_input_embeddings().weight
    assert same is shared
    other = job.stream(Edited(own.source, "model.embed_tokens.weight")).model.get_input_embeddings().weight
    assert other.data_ptr() != shared.data_ptr() and (other != shared).sum() == 1
    assert job.stream().model.get_input_embeddings().weight is shared


@pytest.mark.parametrize("tie", [True, False])
def test_what_lies_outside_the_blocks_is_released_and_comes_back(tmp_path: Path, tie: bool) -> None:
    folder = tiny_llama(tmp_path / "m", tie=tie)
    job = prepare(load_config(None, {"model": str(folder), "device": "cpu", "group_size": 32}))
    stream, rows = job.stream(), torch.arange(12).view(2, 6)
    hidden = torch.cat(list(stream.embed(rows, 2).hidden))
    logits = stream.outputs(rows, hidden)
    stream.release_ends()
    assert stream.model.get_output_embeddings().weight.device.type == "meta"
    assert not job.matrices
    assert torch.equal(stream.outputs(rows, hidden), logits)
    stream.release_ends()
    assert torch.equal(torch.cat(list(stream.embed(rows, 2).hidden)), hidden)


def test_a_head_that_is_replaced_in_place_stays(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", tie=False)
    settings = {"model": str(folder), "device": "cpu", "group_size": 32, "quantize_lm_head": True}
    stream = prepare(load_config(None, settings)).stream()
    stream.release_ends()
    assert stream.model.get_output_embeddings().weight.device.type == "cpu"
