"""The recipes of configs/ suit a model: what a dry run checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.config import load_config
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.run.job import prepare

FOLDER = Path(__file__).resolve().parents[2] / "configs"
RECIPES = [p for p in sorted(FOLDER.glob("*.yaml")) if p.stem not in ("default", "batch-example")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_carried_out(place: Path, path: Path) -> None:
    config = load_config(path, {"model": str(place / "model"), "device": "cpu"})
    description = describe(prepare(config))
    assert description["achievable_bpw"][0] <= config.target_bpw <= description["achievable_bpw"][1]
    assert description["group_falls"] == []
