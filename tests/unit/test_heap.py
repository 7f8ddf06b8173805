"""What the heap gives back, and matrices that streams share."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from hawqtool.config import load_config
from hawqtool.model import heap
from hawqtool.pipeline.job import prepare
from tests.tiny import tiny_llama


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
