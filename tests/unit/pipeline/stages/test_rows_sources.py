"""Sources that are not there are refused before any of them, or the model, is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.config import RunConfig
from hawqtool.data.tokenizer import load_tokenizer
from hawqtool.errors import InputError
from hawqtool.pipeline.run import job as run_job
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.rows import check_calibration, gather_rows, read_ahead
from hawqtool.runtime.reporter import Silent
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama


@pytest.mark.parametrize("name", ["calibration", "eval_data", "selection_data"])
def test_a_source_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("some text")
    given = {"calibration": str(tmp_path / "text.txt"), name: str(tmp_path / "none.txt")}
    job = prepare(RunConfig(model=str(tiny_llama(tmp_path / "model")), device="cpu", target_bpw=4.5, **given))
    with pytest.raises(InputError, match=r"none\.txt was not found"):
        check_calibration(job)


def test_texts_that_are_cut_ahead_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is loaded once, and what fails is told where the rows are asked for."""
    texts = {name: tmp_path / f"{name}.txt" for name in ("a", "b")}
    for seed, text in enumerate(texts.values()):
        text.write_text(random_text(seed, 4000))
    given = RunConfig(
        model=str(tiny_llama(tmp_path / "model")), device="cpu", bits="3", target_bpw=3.5, group_size=32,
        calibration=(str(texts["a"]),), eval_data=str(texts["b"]), num_samples=16, seq_len=32, eval_samples=4,
    )  # fmt: skip
    job, loaded = prepare(given), list[Path]()
    expected = gather_rows(RunContext(job, Silent()))

    def load(folder: Path, trusted: bool) -> Any:
        loaded.append(folder)
        return load_tokenizer(folder, trusted)

    monkeypatch.setattr(run_job, "load_tokenizer", load)
    job = prepare(given)
    read_ahead(job)
    assert not job.ahead._begun  # a CPU has no time for that
    read_ahead(replace(job, device=torch.device("cuda")))
    assert len(job.ahead._begun) == 2
    found = gather_rows(RunContext(job, Silent()))
    assert not job.ahead._begun and len(loaded) == 1
    assert {role: rows.fingerprint for role, rows in found.items()} == {r: s.fingerprint for r, s in expected.items()}

    texts["b"].write_bytes(b"\xff")
    read_ahead(replace(job, device=torch.device("cuda")))
    with pytest.raises(InputError, match="not UTF-8"):
        gather_rows(RunContext(job, Silent()))
