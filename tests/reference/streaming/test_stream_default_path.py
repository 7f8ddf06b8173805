"""The default path, with token importance, shifted targets and two scale searches, against a float64 replay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import Rows
from hawqtool.sensitivity import token_importance
from tests.support.architecture_table import STORED, mixed_plan, prepare_kind
from tests.support.importance64 import slow_importance
from tests.support.replay64 import DefaultPath, read_packed, replay_default
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind


def test_every_layer_has_the_codes_of_the_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind_named("qwen3")
    source, inputs = save_kind(kind, tmp_path / "source", STORED), calibration_inputs(kind)
    job = prepare_kind(kind, source, target_shift=None)
    monkeypatch.setattr(token_importance, "_STORED", torch.float64)
    rows = with_token_importance(RunContext(job), Rows(inputs, "test", "-"))
    importance = slow_importance(job, inputs, 0.5)
    found = rows.importance or {}
    assert found.keys() == importance.keys()
    for name, expected in importance.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4, msg=name)
    round_to_folder(RunContext(job), mixed_plan(job), rows, tmp_path / "rounded", "test")
    path = DefaultPath(importance, 0.5)
    shares = replay_default(kind, source, inputs, read_packed(tmp_path / "rounded"), path)
    # Free of noise all are equal; a share of 0.45, one pass or other costs leave 0.34 to 0.88 of a layer's codes.
    assert min(shares.values()) >= 0.98, shares
