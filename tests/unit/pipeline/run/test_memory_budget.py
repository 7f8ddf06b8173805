"""How many rows a forward pass takes by default: what fits into the limit, never what is free."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hawqtool.config import load_config
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.memory_budget import (
    CPU_BATCH_SIZE,
    CUDA_BATCH_SIZES,
    Work,
    choose_batch_size,
    make_offload,
)
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tiny_llama(tmp_path_factory.mktemp("placement") / "model")
    job = prepare(load_config(None, {"model": str(folder), "target_bpw": 4.5, "group_size": 32, "device": "cpu"}))
    return Work(job.config, job.index, job.structure, torch.device("cuda"), torch.bfloat16, 128, 2048)


def limited(work: Work, limit: int, **settings: object) -> Work:
    return replace(work, config=work.config.model_copy(update={"max_memory": str(limit), **settings}))


def test_a_gpu_takes_the_most_rows_that_fit(work: Work) -> None:
    needs = [limited(work, 1).needed_bytes(rows) for rows in CUDA_BATCH_SIZES]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
    for rows, needed in zip(CUDA_BATCH_SIZES, needs, strict=True):
        assert choose_batch_size(limited(work, needed)) == rows
        assert choose_batch_size(limited(work, needed - 1)) == max(rows // 2, CUDA_BATCH_SIZES[-1])


def test_what_fits_nowhere_gets_the_fewest_rows_and_a_warning(work: Work) -> None:
    small = limited(work, 1024)
    warnings: list[str] = []
    assert choose_batch_size(small) == CUDA_BATCH_SIZES[-1]
    offload = make_offload(small, CUDA_BATCH_SIZES[-1], warnings.append, None)
    assert offload is not None and offload.memory_bytes == 512
    assert len(warnings) == 1 and "lower --batch-size" in warnings[0]


def test_a_look_at_the_original_needs_memory_of_its_own(work: Work) -> None:
    shifted = replace(limited(work, work.needed_bytes(128)), sees_original=True)
    assert shifted.needed_bytes(128) > work.needed_bytes(128)
    assert choose_batch_size(shifted) == 64


def test_a_cpu_has_a_number_of_its_own(work: Work) -> None:
    assert choose_batch_size(replace(limited(work, 1 << 40), device=torch.device("cpu"))) == CPU_BATCH_SIZE
