"""Calibration of a KV cache: resumed from what was saved, and a source that has scales already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages import kv_cache
from hawqtool.records import Rows
from hawqtool.runtime.reporter import Silent
from hawqtool.runtime.store import NothingSaved
from tests.support.tiny import tiny_llama

NAME = "model.layers.0.self_attn.k_scale"


class Kept(NothingSaved):
    """Keeps contents as JSON would have them."""

    def __init__(self) -> None:
        self.contents: dict[str, Any] = {}

    def load(self, key: str) -> Any:
        return self.contents.get(key)

    def save(self, key: str, content: Any) -> None:
        self.contents[key] = content


def test_a_resumed_run_has_the_same_scales(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny_llama(tmp_path / "model")
    # An original may have such scales; those that are written are the calibrated ones.
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {NAME: torch.full((1,), 7.0)}, folder / "model.safetensors", {"format": "pt"})
    job = prepare(RunConfig(model=str(folder), device="cpu", kv_cache="fp8", bits="8", seq_len=16), writes=False)
    layout = job.layout({unit.name: QuantFormat(8, 32) for unit in job.units})
    entries = [entry for file in layout.files for entry in file.entries if entry.name == NAME]
    assert [(entry.dtype, entry.source) for entry in entries] == [("BF16", None)]
    saved, found = Kept(), []
    for _ in range(2):
        sets = {"calibration": Rows(torch.arange(48).view(3, 16) + 3, "", "")}
        record = kv_cache.calibrate_cache(RunContext(job, Silent(), saved), sets)
        found.append((record, {name: float(scale) for name, scale in sets["calibration"].cache_scales.items()}))
        monkeypatch.setattr(kv_cache, "cache_peaks", None)  # and nothing is walked again
    assert found[0] == found[1] and found[0][1][NAME] < 1 and len(found[0][1]) == 4
