"""What a saved measurement answers without the model: budgets, pins, ignored layers, menus, costs, the frontier."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hawqtool.allocation.second_cost import CostTable
from hawqtool.cli.app import app
from hawqtool.config import load_config
from hawqtool.errors import HawqError, InputError, UsageError
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.allocate import run_allocate, run_frontier
from hawqtool.pipeline.run.files import sensitivity_document, write_json
from hawqtool.records import LinearSpec, Score, SensitivityTable, Unit

WIDTHS = (2, 3, 4, 6)
BLOCKS = 4


def units() -> tuple[Unit, ...]:
    found = []
    for block in range(BLOCKS):
        name = f"layers.{block}"
        pair = tuple(LinearSpec(f"{name}.{p}", 64, 128, block, f"{name}.qk", 2) for p in ("q", "k"))
        found += [Unit(f"{name}.qk", pair)]
        found += [Unit(f"{name}.down", (LinearSpec(f"{name}.down", 128, 96, block, f"{name}.down", 2),))]
    return tuple(found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, scores = random.Random(0), {}
    for unit in units():
        base = 10 ** rng.uniform(-3, 0)
        scores[unit.name] = {QuantFormat(b, 32).label: Score(base * 4.0**-b, 0.0) for b in WIDTHS}
    table = SensitivityTable({"projection": scores}, "gptq", "model", "0" * 64, {}, {})
    path = tmp_path_factory.mktemp("saved") / "sensitivity.json"
    write_json(path, sensitivity_document(table, units(), 1000))
    return path


def allocated(saved: Path, folder: Path, **options: Any) -> dict[str, Any]:
    values = {"model": str(saved), "group_size": 32, "bits": "2,3,4,6", "target_bpw": 4.2} | options
    return run_allocate(load_config(None, values), saved, folder / "plan.json")


def bits_of(document: dict[str, Any]) -> dict[str, int]:
    return {entry["name"]: entry["bits"] for entry in document["layers"]}


def test_group_size_and_widths_are_by_default_those_of_the_file(saved: Path, tmp_path: Path) -> None:
    values = {"model": str(saved), "target_bpw": 4.2}  # 8 bits are usual and were not measured
    found = run_allocate(load_config(None, values), saved, tmp_path / "plan.json")
    assert found["layers"] == allocated(saved, tmp_path)["layers"]


@pytest.mark.parametrize("target", [2.6, 3.0, 3.7, 4.9, 6.4, 20.0])
def test_any_budget(saved: Path, tmp_path: Path, target: float) -> None:
    document = allocated(saved, tmp_path, target_bpw=target)
    assert document["bpw_linears"] <= target and document["solver"] == "exact" and document["gap"] <= 1e-4
    hull = allocated(saved, tmp_path, target_bpw=target, solver="hull")
    assert document["predicted_loss"] <= hull["predicted_loss"] and hull["seconds"] >= 0


def test_a_size_counts_what_stays_as_it_is(saved: Path, tmp_path: Path) -> None:
    full = allocated(saved, tmp_path, target_bpw=None, target_size="40000")
    assert full["budget_bytes"] == 40000 - 1000
    less = allocated(saved, tmp_path, target_bpw=None, target_size="60000", ignore=("layers.0.down",))
    assert less["budget_bytes"] == 60000 - 1000 - 2 * 128 * 96


def test_pins_ignored_layers_and_menus(saved: Path, tmp_path: Path) -> None:
    pinned = bits_of(allocated(saved, tmp_path, pin=("layers.1.q=6", "layers.2.down=8")))
    assert pinned["layers.1.q"] == pinned["layers.1.k"] == 6
    assert pinned["layers.2.down"] == 8, "a pin needs no score"
    document = allocated(saved, tmp_path, ignore=("re:.*[.]down",))
    assert set(document["other_linears"]) == {f"layers.{block}.down" for block in range(BLOCKS)}
    assert not any("down" in name for name in bits_of(document))
    assert set(bits_of(allocated(saved, tmp_path, bits="2,6")).values()) <= {2, 6}


@pytest.mark.parametrize("options", [{"bits": "2,5"}, {"bits": "8", "target_bpw": 9}, {"group_size": 64}])
def test_what_was_not_measured_is_an_error_that_says_what_was(
    saved: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"no score of unit .*measured: w2g32, w3g32, w4g32, w6g32"):
        allocated(saved, tmp_path, **options)


def test_the_frontier_in_csv_and_json(saved: Path, tmp_path: Path) -> None:
    settings = load_config(None, {"model": str(saved), "group_size": 32, "pin": ("layers.0.down=8",)})
    run_frontier(settings, saved, tmp_path / "f.csv", None)
    with (tmp_path / "f.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    document = run_frontier(settings, saved, tmp_path / "f.json", None)
    assert json.loads((tmp_path / "f.json").read_text()) == document
    assert [float(row["predicted_loss"]) for row in rows] == [p["predicted_loss"] for p in document["points"]]
    curve = [p for p in document["points"] if p["kind"] == "frontier"]
    uniform = [p for p in document["points"] if p["kind"] == "uniform"]
    assert [p["bits"] for p in uniform] == list(WIDTHS), "all widths that were measured"
    assert len(curve) == 1 + (len(units()) - 1) * (len(WIDTHS) - 1)
    for first, second in itertools.pairwise(curve):
        assert first["stored_bytes"] < second["stored_bytes"] and first["predicted_loss"] > second["predicted_loss"]
        assert sum(first["formats"][n] != second["formats"][n] for n in first["formats"]) in (1, 2)
    for point in document["points"]:
        assert (
            point["formats"]["layers.0.down"] == "w8g32"
            and point["formats"]["layers.1.q"] == "w" + (point["formats"]["layers.1.k"][1:])
        )
        plan = allocated(saved, tmp_path, target_bpw=point["bpw_linears"], pin=settings.pin, solver="hull")
        assert plan["predicted_loss"] <= point["predicted_loss"] + 1e-12
        if point["kind"] == "frontier":
            assert plan["stored_bytes"] == point["stored_bytes"]
            assert plan["predicted_loss"] == pytest.approx(point["predicted_loss"])


def test_fewer_points_keep_both_ends(saved: Path, tmp_path: Path) -> None:
    settings = load_config(None, {"model": str(saved), "group_size": 32, "bits": "2,6"})
    full = run_frontier(settings, saved, tmp_path / "f.csv", None)["points"]
    for count in (2, 3, 5):
        points = run_frontier(settings, saved, tmp_path / "f.csv", count)["points"]
        curve = [p for p in points if p["kind"] == "frontier"]
        assert len(curve) <= count and all(p in full for p in points)
        whole = [p for p in full if p["kind"] == "frontier"]
        assert (curve[0], curve[-1]) == (whole[0], whole[-1])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("f.txt", {}, "neither .csv nor .json"),
        ("none/f.csv", {}, "does not exist"),
        ("f.csv", {"target_bpw": 4.0}, "answers every budget"),
        ("f.csv", {"bits": "3,5"}, "measured: w2g32"),
    ],
)
def test_wrong_frontiers(saved: Path, tmp_path: Path, name: str, options: dict[str, Any], said: str) -> None:
    settings = load_config(None, {"model": str(saved), "group_size": 32, **options})
    with pytest.raises(UsageError, match=said):
        run_frontier(settings, saved, tmp_path / name, None)


def cost_file(folder: Path, down: float = 1.0) -> Path:
    """Layers of a pair cost their bits, and down projections the reverse of their bits, times a factor."""
    entries = [{"unit": "re:.*[.][qk]$", "format": b, "cost": b} for b in WIDTHS]
    entries += [
        {"unit": f"layers.{n}.down", "format": f"w{b}g32", "cost": down * (8 - b)} for n in range(4) for b in WIDTHS
    ]
    path = folder / "costs.json"
    path.write_text(json.dumps(entries))
    return path


def test_a_second_budget_is_met_and_recorded(saved: Path, tmp_path: Path) -> None:
    free = allocated(saved, tmp_path, target_bpw=4.2, costs=str(cost_file(tmp_path)), max_cost=1000)
    limit = free["cost"] - 4
    document = allocated(saved, tmp_path, target_bpw=4.2, costs=str(cost_file(tmp_path)), max_cost=limit)
    bits = bits_of(document)
    total = sum(8 - b if "down" in name else b for name, b in bits.items())
    assert document["cost"] == pytest.approx(total) and total <= document["max_cost"] == limit
    assert document["predicted_loss"] > free["predicted_loss"] and document["solver"] == "exact"
    assert free["predicted_loss"] == pytest.approx(
        allocated(saved, tmp_path, target_bpw=4.2)["predicted_loss"], rel=1e-3
    )


def test_hardware_is_a_second_budget_but_of_experts(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = allocated(saved, tmp_path, costs="hopper:1", max_cost=1e3)
    assert document["cost"] == pytest.approx(1e6 * document["stored_bytes"] / 3.35e12)
    monkeypatch.setattr("hawqtool.pipeline.allocate.is_expert", lambda _: True)
    with pytest.raises(UsageError, match="a saved measurement does not say"):
        allocated(saved, tmp_path, costs="hopper:1", max_cost=1e3)


def test_a_second_budget_out_of_reach_names_the_range(saved: Path, tmp_path: Path) -> None:
    costs = str(cost_file(tmp_path))
    least, most = 8 * 2 + 4 * 2, 8 * 6 + 4 * 6
    with pytest.raises(UsageError, match=f"costs from {least} to {most} are in reach") as caught:
        allocated(saved, tmp_path, costs=costs, max_cost=least - 1)
    assert caught.value.exit_code == 2
    # Within the bytes the down projections cannot all have 6 bits, so less is in reach than by cost alone.
    with pytest.raises(UsageError, match=r"cannot be met within .* bytes: costs from .* are in reach"):
        allocated(saved, tmp_path, target_bpw=2.7, costs=costs, max_cost=least + 1)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("unit,format,cost\nre:.*,2,1\nre:.*,3,1\n", "c.csv", r"no cost of layers.0.qk in w4g32, .* and 13 more"),
        ("unit,cost\nre:.*,2\n", "c.csv", "no column format"),
        ("unit,format,cost\nre:.*,9,1\n", "c.csv", "entry 1 is malformed .width 9"),
        ("unit,format,cost\na,w4,1\n", "c.csv", "entry 1 is malformed"),
        ("unit,format,cost\na,4,fast\n", "c.csv", "entry 1 is malformed"),
        ("unit,format,cost\na,4,-1\n", "c.csv", "not negative"),
        ("unit,format,cost\na,4,nan\n", "c.csv", "finite"),
        ("unit,format,cost\na,4,1\na,4,2\n", "c.csv", "entry 2 .*two costs, 1 and 2"),
        ("unit,format,cost\nre:(,4,1\n", "c.csv", "entry 1 is malformed"),
        ("unit,format,cost\nre:a{99999999999999},4,1\n", "c.csv", "entry 1 is malformed"),
        (f"unit,format,cost\nre:{'(' * 5000},4,1\n", "c.csv", "entry 1 is malformed"),
        (f'[{{"unit": "a", "format": 4, "cost": {10**400}}}]', "c.json", "entry 1 is malformed"),
        ('[{"unit": "a", "format": 4}]', "c.json", "entry 1 has no 'cost'"),
        ('{"unit": "a"}', "c.json", "no list of objects"),
        ("unit,format,cost\n", "c.txt", "nor JSON"),
    ],
)
def test_damaged_costs_are_one_line(saved: Path, tmp_path: Path, text: str, name: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(HawqError, match=said) as caught:
        allocated(saved, tmp_path, costs=str(tmp_path / name), max_cost=10)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="was not found"):
        allocated(saved, tmp_path, costs=str(tmp_path / "none.csv"), max_cost=10)


def test_names_win_over_patterns_and_units_over_layers(tmp_path: Path) -> None:
    pair, w4, w6 = units()[0], QuantFormat(4, 32), QuantFormat(6, 32)
    path = tmp_path / "c.csv"
    path.write_text("unit,format,cost\nre:.*[.][qk]$,4,1\nlayers.0.k,4,5\nlayers.0.k,w4g32,7\nlayers.0.q,6,1\n")
    table = CostTable(path)
    assert table.cost(pair, w4) == 8 and table.cost(pair, w6) is None
    path.write_text(path.read_text() + "layers.0.qk,4,2.5\n")
    assert CostTable(path).cost(pair, w4) == 2.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"costs": "c.csv"}, "needed together"),
        ({"max_cost": 1.0}, "needed together"),
        ({"costs": "c.csv", "max_cost": 1.0, "solver": "hull"}, "solver exact or auto"),
        ({"costs": "c.csv", "max_cost": 1.0, "plan": "p.json"}, "as it is"),
        ({"costs": "c.csv", "max_cost": math.nan}, "max_cost"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_config(None, {"model": "m", **options})


def test_the_command_prints_one_document_or_the_plan_with_both_budgets(saved: Path, tmp_path: Path) -> None:
    common = ["allocate", str(saved), "--group-size", "32", "-o", str(tmp_path / "p.json")]
    budgets = ["--target-bpw", "4.2", "--bits", "2,3,4,6", "--costs", str(cost_file(tmp_path)), "--max-cost", "60"]
    result = CliRunner().invoke(app, [*common, *budgets, "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["max_cost"] == 60
    text = CliRunner().invoke(app, [*common, *budgets]).stdout
    assert "solver exact" in text and "above the optimum" in text and "of 60" in text
    curve = [*common, "--frontier", str(tmp_path / "f.json")]
    assert json.loads(CliRunner().invoke(app, [*curve, "--json"]).stdout)["schema"] == "hawqtool.frontier/1"
    assert CliRunner().invoke(app, [*common, "--frontier-points", "5", "--target-bpw", "4"]).exit_code == 2
