"""What the figures of a report show, as plain numbers from report.json; `score_figures` adds what scores give."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from hawqtool.records import SensitivityTable, Unit
from hawqtool.report.page.score_figures import score_figures
from hawqtool.report.schema import LayerRecord, PlanEntry, Report, Search
from hawqtool.report.wording import MEASURES, role, tried_plans

Data = dict[str, Any]
Place = tuple[str, str]
"""Role and block of a layer, as labels."""

FIGURE_NAMES = (
    *("frontier", "measured", "search", "bits", "sensitivity"),
    *("roles", "predicted", "layers", "timings"),
)
"""Names of the figures in the order of the page."""

_OUTSIDE = "–"
"""Block of a layer that belongs to none."""
_SCORE_FIGURES = ("frontier", "predicted", "sensitivity", "roles")


def figure_data(
    report: Report, measured: tuple[SensitivityTable, tuple[Unit, ...]] | None
) -> tuple[dict[str, Data], dict[str, str]]:
    """Data of each figure, and why others cannot be drawn, both by name of the figure.

    Args:
        report: Of schema ``hawqtool.report/2``.
        measured: The scores and the units that they belong to, None where nothing was measured.
    """
    figures, missing = dict[str, Data](), dict[str, str]()
    places = _places(entry["name"] for entry in report["plan"])
    points, evaluation = measured_points(report), report["evaluation"]
    if points and evaluation is not None:
        figures["measured"] = {"points": points, "measure": MEASURES[evaluation["measure"]]}
    elif evaluation is not None:
        missing["measured"] = "no plan has a finite measured value."
    figures["bits"] = _bits(report["plan"], places)
    roles = _layer_errors(report["layers"], places)
    if roles:
        figures["layers"] = {"roles": roles, "method": report["config"]["rounding"]}
    else:
        missing["layers"] = "no layer inside a block has a finite error."
    figures["timings"] = _timings(report["timings"])
    if report["search"] is not None and evaluation is not None:
        figures["search"] = _search(report["search"], MEASURES[evaluation["measure"]])
    if measured is None:
        missing |= dict.fromkeys(_SCORE_FIGURES, _not_measured(report["config"]))
    else:
        drawn, left_out = score_figures(report, points, *measured)
        figures, missing = figures | drawn, missing | left_out
    return figures, missing


def measured_points(report: Report) -> list[Data]:
    """The plans that were rounded and evaluated.

    Returns:
        Points of ``{mark, label, kind, shipped, bpw, value, stderr, predicted}`` with the predicted loss by metric;
        values that are not finite are left out.
    """
    evaluation = report["evaluation"]
    if evaluation is None:
        return []
    points = [_point(plan, evaluation["measure"]) for plan in tried_plans(report)]
    return [point for point in points if math.isfinite(point["value"])]


def _point(plan: Data, measure: str) -> Data:
    record = plan["record"]
    stderr = record.get(f"{measure}_stderr")
    return {
        "mark": plan["mark"],
        "label": f"{plan['mark']} {plan['name']}" if plan["kind"] == "mixed" else plan["name"],
        "kind": plan["kind"],
        "shipped": plan["shipped"],
        "bpw": record["bpw_linears"],
        "value": record[measure],
        "stderr": None if stderr is None or not math.isfinite(stderr) else stderr,
        "predicted": record["predicted"],
    }


def _search(search: Search, measure: str) -> Data:
    trials = sorted(search["trials"], key=lambda trial: trial["stored_bytes"])
    return {
        "bound": search["bound"],
        "bpw": [trial["bpw_linears"] for trial in trials],
        "series": {role: [a["divergence"][role] for a in trials] for role in trials[0]["divergence"]},
        "measure": measure,
    }


def _places(names: Iterable[str]) -> dict[str, Place]:
    """Role and block of each layer; where several stacks have blocks, their names tell the roles apart."""
    parts = {name: re.match(r"(?:(?P<stack>.*?)\.)?(?P<block>\d+)\.", name) for name in names}
    stacks = {match["stack"] for match in parts.values() if match}
    return {
        name: (
            f"{match['stack']} · {role(name)}" if match and len(stacks) > 1 else role(name),
            str(int(match["block"])) if match else _OUTSIDE,
        )
        for name, match in parts.items()
    }


def _bits(plan: list[PlanEntry], places: dict[str, Place]) -> Data:
    cells: dict[Place, set[int]] = defaultdict(set)
    stored: dict[int, int] = defaultdict(int)
    for entry in plan:
        cells[places[entry["name"]]].add(entry["bits"])
        stored[entry["bits"]] += entry["bytes"]
    total = sum(stored.values())
    blocks = {block for _, block in cells}
    return {
        "roles": list(dict.fromkeys(role for role, _ in cells)),
        "blocks": sorted(blocks, key=lambda block: math.inf if block == _OUTSIDE else int(block)),
        "cells": {place: sorted(widths) for place, widths in cells.items()},
        "share": {bits: stored[bits] / total for bits in sorted(stored)},
    }


def _layer_errors(layers: dict[str, LayerRecord], places: dict[str, Place]) -> dict[str, list[list[float]]]:
    """Role to ``[block, error, error of plain rounding]``; layers that share a place, as experts do, are averaged."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, values in layers.items():
        label, block = places[name]
        error, plain = values["output_error"], values["rtn_error"]
        if error is None or plain is None or block == _OUTSIDE:
            continue
        if math.isfinite(error) and math.isfinite(plain):
            found[label][int(block)].append((error, plain))
    return {
        label: [
            [block, *(math.fsum(column) / len(column) for column in zip(*pairs, strict=True))]
            for block, pairs in sorted(blocks.items())
        ]
        for label, blocks in found.items()
    }


def _timings(timings: dict[str, float]) -> Data:
    names = [stage.replace("_", " ") for stage in timings]
    return {"names": names, "values": list(timings.values()), "errors": [], "axis": "seconds"}


def _not_measured(config: Data) -> str:
    if config.get("plan"):
        return "the plan was given as a file, so no sensitivity was measured."
    return "reproduce/ has no sensitivity.json: every layer had one format to take, so no sensitivity was measured."
