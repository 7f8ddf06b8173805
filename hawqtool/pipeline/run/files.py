"""sensitivity.json and plan.json, the files between the stages; schemas of what is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, field_validator

from hawqtool.errors import InputError, ResourceError, UsageError, disk_errors
from hawqtool.formats import MAX_BITS, MIN_BITS, QuantFormat, parse_label
from hawqtool.parsing import MAX_RECORD_BYTES, MAX_RECORD_VALUES, ParseError, load_json, short, shown
from hawqtool.records import BitPlan, LinearSpec, Score, SensitivityTable, Unit, UnitScores
from hawqtool.report.documents import MemberRecord, PlanDocument, SensitivityDocument
from hawqtool.report.schema import PlanEntry, Report
from hawqtool.values import parse_group_size

MAX_FEATURES = 1 << 40

Count = Annotated[StrictInt, Field(gt=0, le=MAX_FEATURES)]

Name = Annotated[StrictStr, Field(min_length=1, max_length=1000)]


SENSITIVITY_SCHEMA = "hawqtool.sensitivity/1"
PLAN_SCHEMA = "hawqtool.plan/1"
REPORT_SCHEMA = "hawqtool.report/2"
PART = ".part"
"""Ending of the hidden file beside its place that a text is in until it is complete."""


def check_writable(path: Path, flag: str = "--output") -> None:
    """Check before the work that the file of a flag can be created.

    Raises:
        UsageError: If its folder does not exist or it is a folder itself.
        ResourceError: If its folder cannot be written to.
    """
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder, a file was expected; add a file name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the parent folder of {path} does not exist; create it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ResourceError(f"{flag} {path} cannot be written: its folder is read-only; choose another place")


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a document by atomic rename."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 by atomic rename.

    Raises:
        ResourceError: If the disk refuses; an earlier file is as it was then.
    """
    temporary = path.with_name(f".{path.name}{PART}")
    with disk_errors(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """Read a document and check its schema.

    Raises:
        InputError: If the file is missing, no JSON, or of another schema.
    """
    if not os.path.isfile(path):
        raise InputError(f"{short(str(path))} was not found; check the path")
    try:
        document = load_json(path, MAX_RECORD_BYTES, MAX_RECORD_VALUES)
    except ParseError as error:
        raise InputError(f"{path} is not valid JSON: {error}; write it again") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != schema:
        raise InputError(f"{path} has schema {shown(found)}, expected {schema!r}; give a file of that kind")
    return document


def read_report(path: Path) -> Report:
    """Read a report.json.

    Raises:
        InputError: If the file is missing, no JSON, or of another schema.
    """
    return cast(Report, read_json(path, REPORT_SCHEMA))


def sensitivity_document(
    table: SensitivityTable, units: tuple[Unit, ...], unquantized_bytes: int
) -> SensitivityDocument:
    """JSON form of a table; it carries the units' shapes, so allocation needs nothing else.

    Args:
        table: The scores.
        units: Units that were measured.
        unquantized_bytes: Bytes of the output files that do not depend on the plan (an upper bound by a few
            bytes of header), for size targets.
    """
    return {
        "schema": SENSITIVITY_SCHEMA,
        "model": table.model,
        "model_fingerprint": table.model_fingerprint,
        "rounding": table.rounding,
        "symmetric": table.symmetric,
        "settings": table.settings,
        "rows": table.rows,
        "unquantized_bytes": unquantized_bytes,
        "units": {unit.name: [cast(MemberRecord, asdict(member)) for member in unit.members] for unit in units},
        "scores": {
            metric: {
                unit: {label: [s.value, None if math.isnan(s.stderr) else s.stderr] for label, s in scores.items()}
                for unit, scores in by_unit.items()
            }
            for metric, by_unit in table.scores.items()
        },
        "projections": table.projections,
        "curvature": {
            unit: {key: None if math.isnan(value) else value for key, value in values.items()}
            for unit, values in table.curvature.items()
        },
        "warnings": list(table.warnings),
    }


def read_sensitivity(path: Path) -> tuple[SensitivityTable, tuple[Unit, ...], int]:
    """Table, units and plan-independent bytes of a sensitivity.json.

    Raises:
        InputError: If the file is no such document.
    """
    return parse_sensitivity(read_json(path, SENSITIVITY_SCHEMA), str(path))


def parse_sensitivity(document: Mapping[str, Any], name: str) -> tuple[SensitivityTable, tuple[Unit, ...], int]:
    """Table, units and plan-independent bytes of the JSON form of a table.

    Raises:
        InputError: If it is damaged; ``name`` says what.
    """
    try:
        found = SensitivityFile.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{name} is damaged ({first_problem(error)}); measure again") from error
    units = tuple(Unit(n, tuple(LinearSpec(**m.model_dump()) for m in ms)) for n, ms in found.units.items())
    scores = {
        metric: {
            unit: {label: Score(_number(value), _number(error)) for label, (value, error) in by_label.items()}
            for unit, by_label in by_unit.items()
        }
        for metric, by_unit in found.scores.items()
    }
    table = SensitivityTable(
        scores=scores,
        rounding=found.rounding,
        model=found.model,
        model_fingerprint=found.model_fingerprint,
        rows=found.rows,
        settings=found.settings,
        symmetric=found.symmetric,
        projections=found.projections,
        curvature={
            unit: {key: _number(value) for key, value in values.items()} for unit, values in found.curvature.items()
        },
        warnings=tuple(found.warnings),
    )
    return table, units, found.unquantized_bytes


def _number(value: float | None) -> float:
    """JSON has no NaN, so null stands for it."""
    return math.nan if value is None else value


def metric_scores(table: SensitivityTable, metric: str, path: Path) -> UnitScores:
    """Scores of one metric of a sensitivity.json, by unit and format.

    Raises:
        InputError: If the file has no such scores.
    """
    if metric not in table.scores:
        raise InputError(f"{path} has no scores of {metric} (it has {', '.join(table.scores)}); measure again")
    return table.scores[metric]


def plan_entry(linear: LinearSpec, quant_format: QuantFormat) -> PlanEntry:
    """What plans and reports say of the format of a linear."""
    entry: PlanEntry = {
        "name": linear.name,
        "unit": linear.unit,
        "bits": quant_format.bits,
        "group_size": quant_format.group_size or "channel",
        "symmetric": quant_format.symmetric,
        "bytes": linear.stored_bytes(quant_format),
    }
    if not quant_format.is_plain:
        entry["format"] = quant_format.label
    return entry


def plan_document(plan: BitPlan, units: tuple[Unit, ...], other_linears: tuple[str, ...]) -> PlanDocument:
    """JSON form of a plan, one entry per layer, editable by hand."""
    layers = [plan_entry(member, plan.formats[unit.name]) for unit in units for member in unit.members]
    for entry, member in zip(layers, (member for unit in units for member in unit.members), strict=True):
        if member.module:
            entry["module"] = member.module
        if member.transposed:
            entry["transposed"] = True
    return {
        "schema": PLAN_SCHEMA,
        "bpw_linears": plan.bpw,
        "stored_bytes": plan.stored_bytes,
        "budget_bytes": plan.budget_bytes,
        "predicted_loss": plan.predicted_loss,
        "metric": plan.metric,
        "solver": plan.solver,
        "lower_bound": plan.lower_bound,
        "gap": plan.gap,
        "seconds": plan.seconds,
        "cost": plan.cost,
        "max_cost": plan.max_cost,
        "layers": layers,
        "other_linears": list(other_linears),
    }


def read_plan(path: Path, units: tuple[Unit, ...]) -> BitPlan:
    """The plan of a file for the units of a model.

    Raises:
        InputError: If the file is damaged.
        UsageError: If layers are missing, unknown, or fused layers disagree; names them.
    """
    document = read_json(path, PLAN_SCHEMA)
    try:
        entries = [(str(entry["name"]), entry_format(entry)) for entry in document["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({shown(error)}); each layer needs name, bits 2 to 8 and group_size; repair it"
        ) from error
    formats = dict(entries)
    if len(formats) < len(entries):
        raise InputError(f"{path} has a layer twice among its {len(entries)}; expected each once; remove one")
    members = {m.name: m for unit in units for m in unit.members}
    wrong = sorted(formats.keys() ^ members.keys())
    if wrong:
        kind = "no format for" if wrong[0] in members else "a format for unknown or ignored"
        raise UsageError(
            f"{path} has {kind} layer {short(wrong[0])} ({len(wrong)} such); plan and model (with --ignore) must agree"
        )
    for unit in units:
        found = {formats[m.name].label for m in unit.members}
        if len(found) > 1:
            raise UsageError(
                f"{path}: {unit.name} is fused by engines but has formats {', '.join(sorted(found))}; use one, or "
                "--profile transformers"
            )
    for name, fmt in formats.items():
        if not fmt.fits(members[name].out_features, members[name].in_features):
            raise UsageError(
                f"{path}: group size {fmt.group_size} does not divide {name} ({members[name].in_features} inputs)"
            )
    by_unit = {unit.name: formats[unit.members[0].name] for unit in units}
    stored = sum(unit.stored_bytes(by_unit[unit.name]) for unit in units)
    return BitPlan(by_unit, stored, sum(unit.num_weights for unit in units))


def plan_record(plan: BitPlan) -> dict[str, Any]:
    """A plan with all that is known of it, for `plan_of_record`."""
    return vars(plan) | {"formats": {unit: fmt.label for unit, fmt in plan.formats.items()}}


def plan_of_record(record: dict[str, Any]) -> BitPlan:
    """Inverse of `plan_record`."""
    return BitPlan(**record | {"formats": {unit: parse_label(label) for unit, label in record["formats"].items()}})


def entry_format(entry: Mapping[str, Any]) -> QuantFormat:
    """Format of an entry of a plan.

    Raises:
        ValueError: If it is none.
    """
    if "format" in entry:
        return parse_label(str(entry["format"]))
    bits, size, symmetric = entry["bits"], entry["group_size"], entry.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric {shown(symmetric)}, expected true or false")
    # `type`, as True and 4.0 equal numbers too.
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits {shown(bits)}, expected {MIN_BITS} to {MAX_BITS}")
    if size != "channel" and type(size) is not int:
        raise ValueError(f"group_size {shown(size)}, expected a number or channel")
    try:
        return QuantFormat(bits, parse_group_size(size), symmetric)
    except ValueError as error:
        raise ValueError(f"group_size {shown(size)}, {error}") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Member(BaseModel):
    """One linear layer of a unit; the fields of `hawqtool.records.LinearSpec`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    out_features: Count
    in_features: Count
    block: StrictInt
    unit: Name
    scale_bytes: Annotated[StrictInt, Field(ge=1, le=8)]
    module: Name | None = None
    transposed: StrictBool = False


class SensitivityFile(BaseModel):
    """The document; a score is ``[value, standard error or null]``."""

    model_config = ConfigDict(frozen=True)

    units: dict[Name, Annotated[list[Member], Field(min_length=1)]]
    scores: dict[str, dict[str, dict[str, Annotated[list[float | None], Field(min_length=2, max_length=2)]]]]
    rounding: StrictStr
    model: StrictStr
    model_fingerprint: StrictStr
    rows: dict[str, str]
    settings: dict[str, int | float | str]
    # Files that do not say so were written before there were other grids.
    symmetric: StrictBool = True
    projections: dict[str, dict[str, list[float]]] = {}
    curvature: dict[str, dict[str, float | None]] = {}
    warnings: list[str] = []
    unquantized_bytes: Annotated[StrictInt, Field(ge=0)]

    @field_validator("scores")
    @classmethod
    def _check_scores(cls, scores: dict[str, dict[str, dict[str, list[float | None]]]]) -> Any:
        for metric, by_unit in scores.items():
            for unit, by_label in by_unit.items():
                for label, (value, _) in by_label.items():
                    parse_label(label)
                    if value is None or not abs(value) < float("inf"):
                        raise ValueError(f"{shown(metric)} of {shown(unit)} in {label} is {value}, expected a number")
        return scores


def first_problem(error: ValidationError) -> str:
    """Where the first thing that is wrong stands, and what it is."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{shown(place)}: {problem['msg'].removeprefix('Value error, ')}, found {shown(problem['input'])}"
