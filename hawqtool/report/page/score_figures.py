"""What the figures of a report show of the scores: frontier, sensitivity, predicted against measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from hawqtool.allocation.frontier import frontier
from hawqtool.allocation.problem import AllocationProblem, build_problem, predicted_loss, resolve_pins
from hawqtool.allocation.uniform import uniform_plans
from hawqtool.errors import HawqError
from hawqtool.formats import parse_label
from hawqtool.records import Score, SensitivityTable, Unit, UnitFormats, UnitScores
from hawqtool.report.schema import Report
from hawqtool.report.wording import MEASURES, role, shown_metric, tried_plans

Data = dict[str, Any]

_LOSS_UNITS = {"kl": "nats per output", "embedding_error": "relative squared error"}
_TOP_UNITS = 30


def score_figures(
    report: Report, points: list[Data], table: SensitivityTable, units: tuple[Unit, ...]
) -> tuple[dict[str, Data], dict[str, str]]:
    """Data of the figures that need scores, and why others of them cannot be drawn.

    Args:
        report: Of schema ``hawqtool.report/2``.
        points: Plans with measured quality (`figure_data.measured_points`).
        table: The scores.
        units: Units that were measured.
    """
    metric = shown_metric(report)
    planned = {entry["unit"] for entry in report["plan"]}
    units = tuple(unit for unit in units if unit.name in planned)
    if metric not in table.scores or len(units) < len(planned):
        reason = "reproduce/sensitivity.json has no scores of one metric for all units of the plan."
        return {}, dict.fromkeys(("frontier", "predicted", "sensitivity", "roles"), reason)
    scores, loss_unit = table.scores[metric], _loss_unit(report)
    figures = _sensitivity(scores, units, f"{metric} score, {loss_unit}")
    try:
        problem, pins = _problem(report["config"], units, scores, table.symmetric)
        curve = frontier(problem).points
    except HawqError as error:
        return figures, dict.fromkeys(("frontier", "predicted"), f"{error}.")
    both = [p | {"predicted": p["predicted"][metric]} for p in points if metric in p["predicted"]]
    sizes = {parse_label(label).group_size for by_label in scores.values() for label in by_label}
    uniform = [
        (candidate.label, problem.bpw(candidate.stored_bytes), loss)
        for candidate in uniform_plans(units, table.symmetric, sizes)
        if (loss := predicted_loss(candidate.formats, scores, pins)) is not None
    ]
    figures["frontier"] = {
        "hull": [(problem.bpw(stored), loss) for stored, loss in curve],
        "uniform": uniform,
        "plans": both,
        "unit": f"{metric}, {loss_unit}",
    }
    both, evaluation = both + _searched(report, dict(curve)), report["evaluation"]
    if not both or evaluation is None:
        return figures, {"predicted": "no plan has both a prediction and a measurement."}
    measure = MEASURES[evaluation["measure"]]
    figures["predicted"] = {"points": both, "measure": measure, "unit": f"{metric}, {loss_unit}"}
    return figures, {}


def _loss_unit(report: Report) -> str:
    return "loss" if report["evaluation"] is None else _LOSS_UNITS[report["evaluation"]["measure"]]


def _problem(
    config: Data, units: tuple[Unit, ...], scores: UnitScores, symmetric: bool
) -> tuple[AllocationProblem, UnitFormats]:
    """The problem of the run, and its pins: measured formats of the widths that were allowed."""
    measured = {unit.name: [parse_label(label) for label in scores[unit.name]] for unit in units}
    allowed = config["bits"]
    menu = {
        name: tuple(fmt for fmt in formats if allowed is None or fmt.bits in allowed)
        for name, formats in measured.items()
    }
    pins = resolve_pins(config["pin"], units, {n: fmts[0].group_size for n, fmts in measured.items()}, symmetric)
    return build_problem(units, menu, scores, pins), pins


def _searched(report: Report, predictions: Mapping[int, float]) -> list[Data]:
    """The trials of a search for a quality target as points, except those that are points already."""
    trials = report["search"]["trials"] if report["search"] else []
    shown = {plan["record"]["stored_bytes"] for plan in tried_plans(report)}
    return [
        {"mark": "", "label": "tried in the search", "kind": "searched", "shipped": False, "stderr": None}
        | {"predicted": predictions[trial["stored_bytes"]], "value": trial["divergence"]["report"]}
        for trial in trials
        if trial["stored_bytes"] in predictions and trial["stored_bytes"] not in shown
    ]


def _sensitivity(scores: UnitScores, units: tuple[Unit, ...], axis: str) -> dict[str, Data]:
    """The most sensitive units at their narrowest measured width, and the sums over the units of each role."""
    narrowest = {
        unit.name: scores[unit.name][min(scores[unit.name], key=lambda label: parse_label(label).bits)]
        for unit in units
    }
    width = min(parse_label(label).bits for unit in units for label in scores[unit.name])
    # By magnitude, so that strongly negative scores, which a sampled trace can give, are seen.
    top = sorted(narrowest, key=lambda name: -abs(narrowest[name].value))[:_TOP_UNITS]
    top.sort(key=lambda name: -narrowest[name].value)
    negative = sum(score.value < 0 for score in narrowest.values())
    title = f"{len(top)} of {len(narrowest)} units" + (f"; {negative} of all have a negative score" if negative else "")
    by_role: dict[str, list[Score]] = defaultdict(list)
    for name, score in narrowest.items():
        by_role[role(name)].append(score)
    axis = f"{axis}, at {width} bits"
    return {
        "sensitivity": {
            "names": [_short(name) for name in top],
            "values": [narrowest[name].value for name in top],
            "errors": [narrowest[name].stderr for name in top],
            "axis": axis,
            "title": title,
        },
        "roles": {
            "names": [f"{name} ({len(found)})" for name, found in by_role.items()],
            "values": [math.fsum(score.value for score in found) for found in by_role.values()],
            "errors": [math.hypot(*(score.stderr for score in found)) for found in by_role.values()],
            "axis": f"sum of {axis}",
        },
    }


def _short(name: str) -> str:
    """Block and role of a unit: ``12 · self_attn.qkv_proj``."""
    block = next((part for part in name.split(".") if part.isdigit()), None)
    return role(name) if block is None else f"{block} · {role(name)}"
