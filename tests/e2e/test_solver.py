"""`solver`: the exact plan is never predicted worse than the frontier's, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.pipeline.allocating import run_allocate
from tests.e2e.runs import settings


@pytest.mark.parametrize("target", [3.1, 4.2, 5.0, 6.3])
def test_exact_is_never_worse_than_the_hull(place: Path, sensitivity: Path, tmp_path: Path, target: float) -> None:
    plans = {
        solver: run_allocate(
            settings(place, bits="2,3,4,8", target_bpw=target, solver=solver), sensitivity, tmp_path / f"{solver}.json"
        )
        for solver in ("hull", "exact")
    }
    hull, exact = plans["hull"], plans["exact"]
    assert exact["predicted_loss"] <= hull["predicted_loss"]
    assert exact["stored_bytes"] <= exact["budget_bytes"]
    assert exact["lower_bound"] <= exact["predicted_loss"]
    assert (hull["solver"], exact["solver"]) == ("hull", "exact")
