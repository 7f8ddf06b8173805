"""The bytes of a model are hashed beside other work on a GPU's host, and all of them are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.checkpoint.content import ContentRecord
from hawqtool.config import RunConfig
from hawqtool.errors import InputLostError
from hawqtool.pipeline.run.identity import content_beside, record_content, stamps
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import tiny_model


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return prepare(RunConfig(model=str(tiny_model("llama", tmp_path / "m")), device="cpu"))


def on_gpu(job: Job) -> Any:
    return replace(job, device=torch.device("cuda"))


def test_what_is_hashed_beside_is_what_is_hashed(job: Job) -> None:
    record_content(job.index, stamps(job.index), Silent())
    told: list[tuple[int, int]] = []
    reporter = Silent()
    reporter.progress = lambda _stage, done, total: told.append((done, total))  # type: ignore[method-assign]
    other = on_gpu(replace(job, index=replace(job.index, content=ContentRecord())))
    with content_beside(other, stamps(other.index)) as begun:
        record_content(other.index, stamps(other.index), reporter, begun)
    assert other.index.content.weights == job.index.content.weights  # type: ignore[union-attr]
    assert told[-1][0] == told[-1][1] > 0


def test_a_file_that_changed_is_said(job: Job) -> None:
    before, file = stamps(job.index), job.index.files[0]
    with content_beside(on_gpu(job), before):
        pass  # what is not waited for is given up
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputLostError, match="safetensors"), content_beside(on_gpu(job), before):
        pass
