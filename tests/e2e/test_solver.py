"""`solver`: the exact plan is never predicted worse than the frontier's, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.errors import UsageError
from hawqtool.pipeline.allocate import run_allocate
from tests.support.runs import Run, settings


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


def test_a_second_budget_holds_from_the_file_to_the_report(run: Run, place: Path, tmp_path: Path) -> None:
    costs = tmp_path / "costs.csv"
    costs.write_text("unit,format,cost\n" + "".join(f"re:.*,{bits},{bits}\n" for bits in (2, 3, 4, 8)))
    target = {"bits": "2,3,4,8", "target_bpw": 6.0}
    free = run(**target)[1]
    units = {entry["unit"]: entry["bits"] for entry in free["plan"]}
    limit = 3.0 * len(units)
    folder, report = run(**target, costs=costs, max_cost=limit)
    chosen = {entry["unit"]: entry["bits"] for entry in report["plan"]}
    assert sum(chosen.values()) <= limit < sum(units.values())
    assert (folder / "reproduce/costs.csv").read_text() == costs.read_text()
    assert report["config"]["costs"] == "costs.csv"
    with pytest.raises(UsageError, match="are in reach; raise --max-cost"):
        run(**target, costs=costs, max_cost=1.0)
