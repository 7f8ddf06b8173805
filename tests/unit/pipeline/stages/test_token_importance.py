"""Kernels that are compiled before a GPU needs them: once, for all group widths of the menu."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.config import RunConfig
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages import token_importance as stage
from tests.support.tiny import tiny_llama


def test_kernels_are_compiled_for_all_widths_of_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(stage, "compile_ahead", lambda *arguments: asked.append(arguments))
    folder = str(tiny_llama(tmp_path / "m"))
    job = prepare(RunConfig(model=folder, formats=("w4g32", "w4ch", "fp8"), device="cpu", target_bpw=4.5))
    stage.compile_kernels(job)
    assert not asked  # a CPU has other kernels
    on_gpu = replace(job, device=torch.device("cuda"))
    for _ in range(2):  # for the second time nothing is begun
        stage.compile_kernels(on_gpu)
    on_gpu.ahead.result(stage._KERNELS, lambda: None)
    inputs = {member.in_features for unit in job.units for member in unit.members}
    assert asked == [(on_gpu.device, False, sorted({32, *inputs}), ((20, 2), (8, 1)))]
