"""Hidden states that are kept during a walk: all of one block or none, and not too often."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hawqtool.pipeline.run.checkpoints import Checkpoints
from hawqtool.runtime.store import NOTHING_SAVED
from hawqtool.streaming import resume_points
from hawqtool.streaming.resume_points import ResumePoints

CPU = torch.device("cpu")


def states(value: float) -> dict[str, list[torch.Tensor]]:
    return {"hidden": [torch.full((2, 3), value), torch.full((1, 3), value + 0.5)], "original": [torch.tensor(-value)]}


def equal(found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for name in expected for a, b in zip(found[name], expected[name], strict=True))


def test_the_latest_states_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_points, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(resume_points, "BYTES_PER_SECOND", 1e12)
    saved, found = Checkpoints(tmp_path), states(0)
    assert ResumePoints(saved, CPU).restore(found, 9) == 0 and equal(found, states(0))
    for blocks in (1, 2, 3):
        ResumePoints(saved, CPU).keep(blocks, states(blocks))
    assert len(saved.keys()) == 4  # three batches and the number of the block
    assert ResumePoints(saved, CPU).restore(found, 2) == 0 and equal(found, states(0))
    assert ResumePoints(saved, CPU).restore(found, 3) == 3 and equal(found, states(3))


def test_half_kept_states_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_points, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(resume_points, "BYTES_PER_SECOND", 1e12)
    saved, found = Checkpoints(tmp_path), states(0)
    ResumePoints(saved, CPU).keep(1, states(1))
    save = Checkpoints.save

    def cut_short(store: Checkpoints, key: str, content: object) -> None:
        if key == "last":
            raise KeyboardInterrupt
        save(store, key, content)

    monkeypatch.setattr(Checkpoints, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        ResumePoints(saved, CPU).keep(2, states(2))
    assert ResumePoints(saved, CPU).restore(found, 9) == 1 and equal(found, states(1))


@pytest.mark.parametrize(("least", "rate", "kept"), [(9.0, 1e12, False), (0.0, 1.0, False), (0.0, 1e12, True)])
def test_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, rate: float, kept: bool) -> None:
    monkeypatch.setattr(resume_points, "LEAST_SECONDS", least)
    monkeypatch.setattr(resume_points, "BYTES_PER_SECOND", rate)
    ResumePoints(Checkpoints(tmp_path), CPU).keep(1, states(1))
    assert bool(list(tmp_path.iterdir())) == kept


def test_where_nothing_is_kept_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_points, "LEAST_SECONDS", 0.0)
    found = states(0)
    ResumePoints(NOTHING_SAVED, CPU).keep(1, found)
    assert ResumePoints(NOTHING_SAVED, CPU).restore(found, 9) == 0 and equal(found, states(0))


def test_one_damaged_state_takes_no_others_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_points, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(resume_points, "BYTES_PER_SECOND", 1e12)
    saved, found = Checkpoints(tmp_path), states(0)
    ResumePoints(saved, CPU).keep(1, states(1))
    path = tmp_path / "1-original-0.state"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert ResumePoints(saved, CPU).restore(found, 9) == 0 and equal(found, states(0))
    ResumePoints(saved, CPU).keep(2, states(2))
    assert ResumePoints(saved, CPU).restore(found, 9) == 2 and equal(found, states(2))
