"""The presets suit a model: what a dry run checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.config import load_config
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.run.job import prepare
from hawqtool.presets import preset_names


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_can_be_carried_out(place: Path, name: str) -> None:
    config = load_config(None, {"model": str(place / "model"), "device": "cpu"}, name)
    assert config.target_bpw is not None
    description = describe(prepare(config))
    assert description["achievable_bpw"][0] <= config.target_bpw <= description["achievable_bpw"][1]
    assert description["group_falls"] == []
