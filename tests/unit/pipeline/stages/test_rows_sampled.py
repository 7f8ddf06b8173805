"""Rows that the model writes: how long they are sampled at a time, and that a GPU begins ahead."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hawqtool.config import RunConfig
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.stages import rows as stage
from hawqtool.runtime.background import BegunWork
from hawqtool.runtime.ranks import ALONE
from hawqtool.settings.fields import SELF


@pytest.mark.parametrize(
    ("device", "calibration", "sampled"),
    [("cuda", "text.txt", (8, 128)), ("cpu", "text.txt", (4, 256)), ("cuda", SELF, (4, 512))],
)
def test_rows_that_only_choose_are_two_texts_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, calibration: str, sampled: tuple[int, int]
) -> None:
    def generate(_model: Any, count: int, length: int, _seed: int, _progress: Any, load: Any) -> torch.Tensor:
        assert (count, length) == sampled and load() == "loaded"
        ahead.append(threading.current_thread() is not threading.main_thread())
        return torch.arange(count)[:, None].expand(count, length)

    ahead = list[bool]()
    monkeypatch.setattr(stage, "generate_rows", generate)
    monkeypatch.setattr(stage, "_sampled_model", lambda _: None)
    monkeypatch.setattr(stage, "_of_long_rows", lambda _, quota: quota)
    config = RunConfig(model="m", calibration=calibration)
    settings, place = SimpleNamespace(seq_len=512), torch.device(device)
    job: Any = SimpleNamespace(config=config, settings=settings, device=place, ranks=ALONE, ahead=BegunWork())
    monkeypatch.setattr(stage, "_shares", lambda *_: {SELF: {"selection": 4}})
    monkeypatch.setattr(stage, "_counts", lambda _: {})
    monkeypatch.setattr(stage, "load_sampled", lambda _: "loaded")
    job.index, job.stream = SimpleNamespace(rotation=None), lambda: "with ends"
    job.structure = SimpleNamespace(head="quantized, so that streams share nothing")
    stage.load_ahead(job, resuming=True)
    assert job.ahead.result(stage._ENDS, lambda: "none") == "none"
    job.structure = SimpleNamespace(head=None)
    stage.load_ahead(job, resuming=False)
    assert job.ahead.result(stage._ENDS, lambda: "none") == ("with ends" if device == "cuda" else "none")
    found = stage._sampled_source(RunContext(job), {"selection": 4})
    assert ahead == [device == "cuda"]
    assert found.tokens.shape == (4, 512 if calibration == SELF else 256)
    assert found.tokens[1].unique().tolist() == ([2, 3] if device == "cuda" and calibration != SELF else [1])
