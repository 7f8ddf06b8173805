"""What the figures of a report show of the scores: frontier, sensitivity, predicted against measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hawqtool.allocation.frontier import Frontier, frontier, solve
from hawqtool.allocation.problem import AllocationProblem, build_problem, resolve_pins
from hawqtool.allocation.uniform import uniform_candidates
from hawqtool.errors import HawqError
from hawqtool.formats import CHANNEL, QuantFormat, parse_label
from hawqtool.pipeline.roles import role
from hawqtool.records import SCORE_METRICS, Score, SensitivityTable, Unit
from hawqtool.report.quality import MEASURES

Data = dict[str, Any]
Scores = Mapping[str, Mapping[str, Score]]

_LOSS_UNITS = {"kl": "nats per output", "embedding_error": "relative squared error"}
_TOP_UNITS = 30


def score_figures(
    report: Data, points: list[Data], table: SensitivityTable, units: tuple[Unit, ...]
) -> tuple[dict[str, Data], dict[str, str]]:
    """Data of the figures that need scores, and why others of them cannot be drawn.

    Args:
        report: Of schema ``hawqtool.report/1``.
        points: Plans with measured quality (`figure_data.measured_points`).
        table: The scores.
        units: Units that were measured.
    """
    metric = _metric(report)
    plan = {entry["unit"]: _entry_format(entry) for entry in report["plan"]}
    units = tuple(unit for unit in units if unit.name in plan)
    if metric not in table.scores or len(units) < len(plan):
        reason = f"reproduce/sensitivity.json has no scores of {metric} for all units of the plan."
        return {}, dict.fromkeys(("frontier", "predicted", "sensitivity", "roles"), reason)
    scores, loss_unit = table.scores[metric], _LOSS_UNITS[report["evaluation"]["measure"]]
    figures = _sensitivity(scores, units, f"{metric} score, {loss_unit}")
    try:
        problem = _problem(report["config"], units, scores, table.symmetric)
        curve = frontier(problem)
    except HawqError as error:
        return figures, dict.fromkeys(("frontier", "predicted"), f"{error}.")
    uniform = [
        (candidate.label, candidate.stored_bytes, loss)
        for candidate in uniform_candidates(units, table.symmetric)
        if (loss := _predicted(candidate.formats, scores)) is not None
    ]
    loss = _predicted(plan, scores) if report["predicted_loss"] is None else report["predicted_loss"]
    figures["frontier"] = {
        "hull": [(problem.bpw(stored), loss) for stored, loss in curve.points],
        "uniform": [(label, problem.bpw(stored), loss) for label, stored, loss in uniform],
        "shipped": None if loss is None else (report["sizes"]["bpw_linears"], loss),
        "unit": f"{metric}, {loss_unit}",
    }
    predictions = {stored: loss for _, stored, loss in uniform}
    both = _with_predictions(points, report, problem, curve, predictions)
    if not both:
        return figures, {"predicted": "no plan has both a prediction and a measurement."}
    measure = MEASURES[report["evaluation"]["measure"]]
    figures["predicted"] = {"points": both, "measure": measure, "unit": f"{metric}, {loss_unit}"}
    return figures, {}


def _metric(report: Data) -> str:
    """The metric that the mixed plan was chosen by, also where it was not shipped."""
    config = report["config"]
    if report["metric"] or config["sensitivity"] in SCORE_METRICS:
        return str(report["metric"] or config["sensitivity"])
    return "fisher" if config["rounding"] == "rtn" else "kron"


def _entry_format(entry: Data) -> QuantFormat:
    size = CHANNEL if entry["group_size"] == "channel" else entry["group_size"]
    return QuantFormat(entry["bits"], size, entry["symmetric"])


def _problem(config: Data, units: tuple[Unit, ...], scores: Scores, symmetric: bool) -> AllocationProblem:
    """The problem of the run: measured formats of the widths that were allowed, and its pins."""
    measured = {unit.name: [parse_label(label) for label in scores[unit.name]] for unit in units}
    allowed = config["bits"]
    menu = {
        name: tuple(fmt for fmt in formats if allowed is None or fmt.bits in allowed)
        for name, formats in measured.items()
    }
    pins = resolve_pins(config["pin"], units, {n: fmts[0].group_size for n, fmts in measured.items()}, symmetric)
    return build_problem(units, menu, scores, pins)


def _predicted(formats: Mapping[str, QuantFormat], scores: Scores) -> float | None:
    """Predicted loss of a plan; None if a score of it was not measured."""
    found = [scores[unit].get(fmt.label) for unit, fmt in formats.items()]
    values = [score.value for score in found if score is not None]
    return math.fsum(values) if len(values) == len(found) else None


def _with_predictions(
    points: Sequence[Data], report: Data, problem: AllocationProblem, curve: Frontier, uniform: Mapping[int, float]
) -> list[Data]:
    """The measured points that have a prediction, with it."""
    both = []
    for point in points:
        stored = point["stored_bytes"]
        if point["kind"] == "uniform":
            predicted = uniform.get(stored)
        elif point["kind"] == "mixed" and report["predicted_loss"] is not None:
            predicted = report["predicted_loss"]
        elif point["kind"] == "mixed" and stored >= problem.minimum_bytes:
            # Its formats by unit are not on record when uniform was shipped; the same bytes give the same plan.
            plan = solve(problem, stored, curve=curve)
            predicted = plan.predicted_loss if plan.stored_bytes == stored else None
        else:
            predicted = None
        if predicted is not None:
            both.append(point | {"predicted": predicted})
    return both


def _sensitivity(scores: Scores, units: tuple[Unit, ...], axis: str) -> dict[str, Data]:
    """The most sensitive units at their narrowest measured width, and the sums over the units of each role."""
    narrowest = {
        unit.name: scores[unit.name][min(scores[unit.name], key=lambda label: parse_label(label).bits)]
        for unit in units
    }
    width = min(parse_label(label).bits for unit in units for label in scores[unit.name])
    top = sorted(narrowest, key=lambda name: -narrowest[name].value)[:_TOP_UNITS]
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
            "of": len(narrowest),
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
