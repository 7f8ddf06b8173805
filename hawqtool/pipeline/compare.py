"""The ``compare`` command: two results side by side, from what their reports say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hawqtool.errors import InputError
from hawqtool.pipeline.run.files import entry_format, read_report
from hawqtool.report.documents import ComparedLayer, ComparedResult, ComparisonDocument
from hawqtool.report.schema import PlanEntry, Report, shipped_plan

REPORT = "report.json"


def run_compare(first: Path, second: Path) -> ComparisonDocument:
    """``hawqtool compare``: figures, settings and layers of two results.

    Args:
        first: Output folder of ``hawqtool quantize``, or its report.json.
        second: Another one.

    Returns:
        What they have and where they differ. Figures are compared as they are: the reports hold no figures of
        single rows, so that a difference has no paired standard error.

    Raises:
        InputError: If one is no result of hawqtool, or of another version.
    """
    reports = [_read(path) for path in (first, second)]
    try:
        return _compared((first, second), reports)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{first} and {second} cannot be compared: a report is damaged or of another version ({error!r}); "
            "write it again"
        ) from error


def _read(path: Path) -> Report:
    file = path / REPORT if path.is_dir() else path
    if file.suffix == ".gguf":
        raise InputError(f"{path} is a GGUF file, which has no report.json; look at one with hawqtool inspect")
    if not file.is_file():
        raise InputError(
            f"{path} has no report.json; expected an output folder of hawqtool quantize, or its report.json"
        )
    return read_report(file)


def _compared(paths: tuple[Path, Path], reports: list[Report]) -> ComparisonDocument:
    first, second = reports
    return {
        "schema": "hawqtool.comparison/1",
        "results": [_result(path, report) for path, report in zip(paths, reports, strict=True)],
        "same_model": _origin(first) == _origin(second),
        "same_rows": _judged_on(first) is not None and _judged_on(first) == _judged_on(second),
        "settings": _settings(first["config"], second["config"]),
        "layers": _layers(first, second),
    }


def _judged_on(report: Report) -> str | None:
    """Fingerprint of the rows that the figures are of."""
    rows = report["rows"]["report"]
    return None if rows is None else rows["fingerprint"]


def _result(path: Path, report: Report) -> ComparedResult:
    plan, evaluation = shipped_plan(report), report["evaluation"]
    entries = map(entry_format, report["plan"])
    return {
        "path": str(path),
        "model": report["model"],
        "measure": None if evaluation is None else evaluation["measure"],
        "shipped": report["shipped"],
        "formats": sorted({entry.label for entry in entries}),
        "bpw_linears": report["sizes"]["bpw_linears"],
        "quantized_bytes": report["sizes"]["quantized_bytes"],
        "original_bytes": report["sizes"]["original_bytes"],
        "quality": plan,
        "seconds": sum(report["timings"].values()),
    }


def _origin(report: Report) -> tuple[Any, ...]:
    return report["model"], report["model_revision"], report["sizes"]["original_bytes"], report["architecture"]


def _settings(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    names = sorted({*first, *second})
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def _layers(first: Report, second: Report) -> list[ComparedLayer]:
    """All layers of both, in the order of the first; those of the second alone come last."""
    plans = [{entry["name"]: entry for entry in report["plan"]} for report in (first, second)]
    names = [*plans[0], *(name for name in plans[1] if name not in plans[0])]
    return [
        {
            "name": name,
            "formats": [_label(plan.get(name)) for plan in plans],
            "bytes": [plan[name]["bytes"] if name in plan else None for plan in plans],
            "output_error": [_error(report, name) for report in (first, second)],
        }
        for name in names
    ]


def _label(entry: PlanEntry | None) -> str | None:
    if entry is None:
        return None
    return entry_format(entry).label


def _error(report: Report, name: str) -> float | None:
    return report["layers"][name]["output_error"] if name in report["layers"] else None
