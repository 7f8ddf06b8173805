"""Sources that are not there are refused before any of them, or the model, is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.rows import check_calibration
from tests.support.tiny import tiny_llama


@pytest.mark.parametrize("name", ["calibration", "eval_data", "selection_data"])
def test_a_source_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("some text")
    given = {"calibration": str(tmp_path / "text.txt"), name: str(tmp_path / "none.txt")}
    job = prepare(RunConfig(model=str(tiny_llama(tmp_path / "model")), device="cpu", target_bpw=4.5, **given))
    with pytest.raises(InputError, match=r"none\.txt was not found"):
        check_calibration(job)
