"""The allocate stage: sensitivity table and budget in, bit plan out; or the whole frontier."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from hawqtool.allocation.exact import plan_warnings
from hawqtool.allocation.frontier import CurvePoint, curve_points, uniform_points
from hawqtool.allocation.problem import build_problem, resolve_ignored, resolve_pins
from hawqtool.allocation.roofline import names_hardware
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.formats import CHANNEL, parse_label
from hawqtool.pipeline.run.files import (
    check_writable,
    metric_scores,
    plan_document,
    read_sensitivity,
    write_json,
    write_text,
)
from hawqtool.pipeline.run.menu import budget_bytes, format_menu, measured_menu, widths
from hawqtool.pipeline.search.planner import allocate
from hawqtool.pipeline.stages.measure import score_warnings
from hawqtool.records import Menu, Unit, UnitFormats, UnitScores
from hawqtool.report.documents import FrontierDocument, FrontierPoint, PlanDocument
from hawqtool.runtime.reporter import Reporter, Silent

FRONTIER_SCHEMA = "hawqtool.frontier/1"
JSON_POINTS = 200
"""Points of a frontier in JSON, where each carries the formats of all layers, unless more are asked for."""


@dataclass(frozen=True)
class _Saved:
    """A saved measurement under a configuration.

    Args:
        config: With rounding and kind of grid as they were measured.
        units: Units that are quantized.
        ignored_linears: Layers that ``--ignore`` leaves alone.
        unquantized_bytes: Bytes of the output files that no plan changes.
        metric: Name of the scores.
        scores: Unit name to format label to score.
        pins: Unit name to the one format that it must take.
    """

    config: RunConfig
    units: tuple[Unit, ...]
    ignored_linears: tuple[str, ...]
    unquantized_bytes: int
    metric: str
    scores: UnitScores
    pins: UnitFormats


def run_allocate(config: RunConfig, sensitivity: Path, output: Path, reporter: Reporter | None = None) -> PlanDocument:
    """``hawqtool allocate``: write plan.json for a budget without touching the model.

    Raises:
        UsageError: If a budget is infeasible or a format was not measured.
    """
    config.require_one_target()
    check_writable(output)
    saved = _load(config, sensitivity)
    budget = budget_bytes(saved.config, saved.units, saved.unquantized_bytes, saved.pins)
    menu = _menu(saved, _widths(saved, budget))
    plan = allocate(saved.units, menu, saved.scores, saved.pins, budget, saved.metric, saved.config)
    for text in (*score_warnings({saved.metric: saved.scores}), *plan_warnings(plan)):
        (reporter or Silent()).warn(text)
    document = plan_document(plan, saved.units, saved.ignored_linears)
    write_json(output, document)
    return document


def run_frontier(config: RunConfig, sensitivity: Path, output: Path, count: int | None) -> FrontierDocument:
    """``hawqtool allocate --frontier``: every budget at once, as ``.csv`` or ``.json``.

    The widths are those asked for, else all that were measured. Formats of all layers are in the JSON form only.

    Args:
        config: Without a target.
        sensitivity: The saved measurement.
        output: File to write.
        count: Points of the frontier, evenly spaced in bytes; by default all in CSV and 200 in JSON.

    Returns:
        The JSON form, whatever was written.

    Raises:
        UsageError: If there is a target, the file's name ends otherwise, or a format was not measured.
    """
    if output.suffix.lower() not in (".csv", ".json"):
        raise UsageError(f"--frontier {output} ends in neither .csv nor .json; name it so")
    if config.target_bpw is not None or config.target_size is not None or config.costs is not None:
        raise UsageError("--frontier answers every budget; drop the target (and --costs), or --frontier")
    check_writable(output, "--frontier")
    saved = _load(config, sensitivity)
    menu = _menu(saved, saved.config.given_widths or _measured_widths(saved))
    problem = build_problem(saved.units, menu, saved.scores, saved.pins)
    as_csv = output.suffix.lower() == ".csv"
    points = curve_points(problem, count if count is not None or as_csv else JSON_POINTS)
    points += uniform_points(problem, menu, saved.pins)
    rows = [_row(point, problem.bpw(point.stored_bytes)) for point in points]
    document: FrontierDocument = {"schema": FRONTIER_SCHEMA, "metric": saved.metric, "points": rows}
    if not as_csv:
        for row, point in zip(rows, points, strict=True):
            row["formats"] = {m.name: point.formats[u.name].label for u in saved.units for m in u.members}
    if as_csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(output, text.getvalue())
    else:
        write_json(output, document)
    return document


def _load(config: RunConfig, sensitivity: Path) -> _Saved:
    table, measured, unquantized = read_sensitivity(sensitivity)
    config = config.model_copy(update={"rounding": table.rounding, "symmetric": table.symmetric})
    ignored = resolve_ignored(config.ignore, measured)
    left = tuple(member for unit in measured if unit.name in ignored for member in unit.members)
    # Ignored layers stay in the file at full size, so a size target must count them.
    unquantized += sum(member.num_weights * member.scale_bytes for member in left)
    units = tuple(unit for unit in measured if unit.name not in ignored)
    if names_hardware(config.costs) and any(is_expert(member.name) for unit in units for member in unit.members):
        raise UsageError(
            f"--costs {config.costs} counts routed experts by the share that a token is routed to, which a saved "
            "measurement does not say; use hawqtool quantize --sensitivity, or a file of costs"
        )
    metric = config.metric
    scores = metric_scores(table, metric, sensitivity)
    base = _group_size(scores) if config.chooses_groups else config.base_group_size
    if config.uniform_width is not None:
        config = config.model_copy(update={"group_size": base})
    sizes = {name: fmt.group_size for name, fmt in uniform_formats(units, 8, base).items()}
    pins = resolve_pins(config.pin, units, sizes, config.symmetric)
    return _Saved(config, units, tuple(m.name for m in left), unquantized, metric, scores, pins)


def _menu(saved: _Saved, bits: tuple[int, ...]) -> Menu:
    """The formats that were asked for, else all that were measured at these widths."""
    if not saved.config.chooses_groups:
        return format_menu(saved.units, bits, saved.config)
    return measured_menu(saved.units, bits, saved.scores)


def _widths(saved: _Saved, budget: int) -> tuple[int, ...]:
    """Widths to choose from: the usual ones, or all that were measured where some of those were not."""
    usual = widths(saved.config, saved.units, budget)
    if saved.config.given_widths is not None:
        return usual
    measured = _measured_widths(saved)
    return usual if set(usual) <= set(measured) else measured


def _group_size(scores: UnitScores) -> int:
    """The largest group size that was measured; units that it does not divide have smaller ones."""
    sizes = {parse_label(label).group_size for by_label in scores.values() for label in by_label}
    return max(sizes - {CHANNEL}, default=CHANNEL)


def _measured_widths(saved: _Saved) -> tuple[int, ...]:
    """Widths that were measured of every unit; pinned ones aside, which may have been measured at one more."""
    by_unit = [{parse_label(label).bits for label in saved.scores.get(u.name, {})} for u in saved.units]
    common = set.intersection(*by_unit) if by_unit else set()
    if not common:
        raise UsageError("no width was measured of every unit, at least one was expected; measure again")
    return tuple(sorted(common))


def _row(point: CurvePoint, bpw: float) -> FrontierPoint:
    return {
        "kind": point.kind,
        "bits": point.bits,
        "stored_bytes": point.stored_bytes,
        "bpw_linears": bpw,
        "predicted_loss": point.predicted_loss,
    }
