"""How many rows a forward pass takes by default: what fits into the limit, never what is free."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hawqtool.config import load_config
from hawqtool.model.discovery import Structure
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.memory_budget import (
    CPU_BATCH_SIZE,
    CUDA_BATCH_SIZES,
    Work,
    choose_batch_size,
    importance_rows,
    make_offload,
    scoring_batch,
)
from hawqtool.records import BlockSpec, LinearSpec
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


LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
SMOLLM2 = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))


@pytest.mark.parametrize(
    ("shapes", "seq_len", "batch_size", "rows"),
    [(SMOLLM2, 2048, 128, 32), (SMOLLM2, 2048, 64, 16), (SMOLLM2, 2048, 4, 4), (LLAMA_8B, 2048, 128, 8),
     (LLAMA_8B, 512, 128, 16), (SMOLLM2, 8192, 128, 8)],
)  # fmt: skip
def test_token_importance_takes_more_rows_of_small_models_on_a_gpu(
    work: Work, shapes: tuple[tuple[int, int], ...], seq_len: int, batch_size: int, rows: int
) -> None:
    linears = [LinearSpec(f"m{n}", outs, ins, 0, "unit", 2) for n, (ins, outs) in enumerate(shapes)]
    structure = Structure((BlockSpec(0, "block", tuple((linear,) for linear in linears)),), ())
    shaped = replace(work, structure=structure, seq_len=seq_len)
    assert importance_rows(shaped, batch_size, of_text=True) == rows
    assert importance_rows(shaped, batch_size, of_text=False) == min(8, batch_size)
    assert importance_rows(replace(shaped, device=torch.device("cpu")), batch_size, of_text=True) == 2


@pytest.mark.parametrize(("batch_size", "rows"), [(128, 32), (64, 16), (32, 8), (4, 4)])
def test_rows_behind_the_scores_are_a_quarter_of_a_batch_in_a_pass_of_a_gpu(batch_size: int, rows: int) -> None:
    assert scoring_batch(torch.device("cuda"), batch_size) == rows
    assert scoring_batch(torch.device("cpu"), batch_size) == batch_size
