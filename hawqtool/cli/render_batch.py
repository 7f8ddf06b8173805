"""Tables of a batch for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hawqtool.report.escape import one_line
from hawqtool.report.wording import MEASURES, size

_PIPE_WIDTH, _LONGEST_NOTE = 150, 160
_ROOMY = 140
"""Columns of a terminal from which on the tables have all theirs."""
_NOTE = "note"
_MEASUREMENTS = {"run": "own", "shared": "shared", "file": "file", "none": "none", None: ""}


def summary_table(summary: dict[str, Any], folder: Path) -> None:
    """Print a row per job, and where the rest is written."""
    measures = {row["measure"] for row in summary["jobs"] if row["measure"]}
    heading = MEASURES[measures.pop()] if len(measures) == 1 else "divergence"
    console = _console()
    rows = [_cells(row, heading) for row in summary["jobs"]]
    _print(console, rows, ("code", "uniform", "measured", "seconds"))
    counts = {status: sum(row["status"] == status for row in summary["jobs"]) for status in ("done", "gate failed")}
    failed = len(summary["jobs"]) - sum(counts.values())
    lines = [
        f"{counts['done']} done, {counts['gate failed']} with a failed gate, {failed} failed; "
        f"{summary['ran']} run now, {summary['measured']} measurements made; exit code {summary['exit_code']}"
    ]
    for model in summary["models"]:
        note = "" if model["same_rows"] else " (judged on different rows)"
        lines.append(f"Pareto front of {one_line(model['model'])}{note}: {', '.join(model['pareto'])}")
    lines.append(f"{folder}: summary.json, summary.csv, {', '.join(m['plot'] for m in summary['models'])}".rstrip(", "))
    for line in lines:
        console.print(line, markup=False)


def dry_run_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print what each job would do."""
    cells = []
    for row in rows:
        before, after = row["original_bytes"], row["quantized_bytes"]
        sizes = ["" if value is None else size(value) for value in (before, after)]
        columns = ("job", "target", "rounding", "state", "file now", "at most", _NOTE)
        note = one_line(row["error"] or "", _LONGEST_NOTE)
        values = (row["name"], row["target"], row["rounding"], row["status"], *sizes, note)
        cells.append(dict(zip(columns, values, strict=True)))
    _print(_console(), cells, ("rounding",))


def _cells(row: dict[str, Any], heading: str) -> dict[str, str]:
    """What is shown of a job, by column."""
    return {
        "job": row["name"],
        "status": row["status"] + ("" if row["ran"] or row["status"] in ("failed", "not run") else ", kept"),
        "code": "" if row["exit_code"] is None else str(row["exit_code"]),
        "bits": _number(row["bpw_linears"], ".3f"),
        "file": "" if row["quantized_bytes"] is None else size(row["quantized_bytes"]),
        heading: _number(row["divergence"], ".3g") + _plus_minus(row["divergence_stderr"]),
        "uniform": _number(row["uniform_divergence"], ".3g"),
        "measured": _MEASUREMENTS[row["measurement"]],
        "seconds": _number(row["seconds"], ".0f"),
        _NOTE: one_line(row["error"] or "", _LONGEST_NOTE),
    }


def _print(console: Console, rows: Sequence[dict[str, str]], spare: tuple[str, ...]) -> None:
    """Print a table; where the terminal is narrow without the columns to spare, and with the notes below."""
    narrow = console.width < _ROOMY
    columns = [name for name in (rows[0] if rows else ()) if not narrow or name not in (*spare, _NOTE)]
    table = _table(*columns)
    for row in rows:
        _add(table, *(row[name] for name in columns))
    console.print(table)
    for row in rows if narrow else ():
        if row[_NOTE]:
            console.print(f"{row['job']}: {row[_NOTE]}", markup=False)


def _console() -> Console:
    console = Console(highlight=False)
    # A log has no width of its own, and folded names are hard to search.
    known = console.is_terminal or "COLUMNS" in os.environ
    return console if known else Console(highlight=False, width=_PIPE_WIDTH)


def _table(*columns: str) -> Table:
    table = Table()
    for name in columns:
        numeric = name not in ("job", "status", "state", "target", "rounding", "measured", "note")
        table.add_column(
            name,
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=numeric or name in ("status", "state"),
        )
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # names are shown, never read as markup


def _number(value: float | None, style: str) -> str:
    return "" if value is None else f"{value:{style}}"


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.2g}"
