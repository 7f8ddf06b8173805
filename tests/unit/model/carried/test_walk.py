"""A walk with carried values gives the same when it is cut at any block and when its states lie on the disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig
from hawqtool.pipeline.run.job import prepare
from hawqtool.streaming import resume_points
from hawqtool.streaming.offload import DISK, Offload, StreamMemory
from hawqtool.streaming.stream import ModelStream
from tests.support.replay64 import load, run
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind


class _InMemory:
    def __init__(self) -> None:
        self.contents: dict[str, Any] = {}

    def load(self, key: str) -> Any:
        return self.contents.get(key)

    def save(self, key: str, content: Any) -> None:
        self.contents[key] = content

    def part(self, _: str) -> _InMemory:
        return self

    def drop(self, *keys: str) -> None:
        for key in keys:
            self.contents.pop(key, None)


@pytest.mark.parametrize("name", ["t5", "gemma4-shared"])
def test_a_cut_and_spilled_walk_is_equal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_points, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(resume_points, "BYTES_PER_SECOND", float("inf"))
    kind = kind_named(name)
    source, rows = save_kind(kind, tmp_path / "model"), calibration_inputs(kind)[:3]
    job = prepare(RunConfig(model=str(source), device="cpu"), writes=False)
    stream = job.stream()
    whole = stream.final_hidden(rows, 2, lambda _: None)
    expected = run(kind, load(kind, source, torch.float32), rows)
    assert float((stream.outputs(rows, whole) - expected).abs().max()) < 1e-4

    def cut(index: int) -> None:
        if index in stops:
            stops.remove(index)
            raise KeyboardInterrupt

    offload = Offload(job.device, 0, 0, tmp_path)
    saved, stops = _InMemory(), [0, 2]
    memory = StreamMemory(offload)
    for _ in range(3):
        reader, skeleton = TensorReader(job.index), copy.deepcopy(job.skeleton)
        again = ModelStream(skeleton, job.structure, reader, job.device, torch.float32, memory)
        try:
            found = again.final_hidden(rows, 2, cut, saved)
        except KeyboardInterrupt:
            continue
        assert torch.equal(found, whole)
        break
    assert not stops and offload.peak_bytes[DISK] > 0
