"""Tables of two results for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hawqtool.parsing import printable
from hawqtool.report.documents import ComparedLayer, ComparedResult, ComparisonDocument
from hawqtool.report.escape import one_line
from hawqtool.report.wording import quality_columns, size

_LONGEST_VALUE = 24


def print_comparison(found: ComparisonDocument, every: bool) -> None:
    """Print figures, settings that differ and layers.

    Args:
        found: The comparison.
        every: List layers of equal formats too.
    """
    console = Console(highlight=False)
    console.print(_figures(found))
    for note in _notes(found):
        console.print(f"note: {note}", markup=False)
    if found["settings"]:
        rows = [[name, *map(_value, values)] for name, values in found["settings"].items()]
        console.print(_table("settings that differ", ("setting", "first", "second"), rows))
    layers = [layer for layer in found["layers"] if every or layer["formats"][0] != layer["formats"][1]]
    if layers:
        prefix = _prefix([layer["name"] for layer in layers])
        title = ("layers" if every else "layers that differ") + (f" (names begin with {prefix})" if prefix else "")
        headings = ("layer", "first", "second", "more bytes", "times the error")
        console.print(_table(title, headings, [_layer(layer, prefix) for layer in layers]))
    equal = len(found["layers"]) - sum(layer["formats"][0] != layer["formats"][1] for layer in found["layers"])
    console.print(f"{equal} of {len(found['layers'])} layers have the same format in both", markup=False)


def _figures(found: ComparisonDocument) -> Table:
    results = found["results"]
    rows = [
        ["name", *(_short(Path(result["path"]).name) for result in results)],
        ["original", *(_short(result["model"]) for result in results)],
        ["plan", *(f"{result['shipped']}: {' '.join(result['formats'])}" for result in results)],
        ["bits per weight", *(f"{result['bpw_linears']:.3f}" for result in results)],
        ["weight files", *(size(result["quantized_bytes"]) for result in results)],
        ["times smaller", *(f"{result['original_bytes'] / result['quantized_bytes']:.2f}" for result in results)],
    ]
    shown = [_quality(result) for result in results]
    for name in dict.fromkeys(name for cells in shown for name in cells):
        rows.append([name, *(cells.get(name, "not evaluated" if not cells else "") for cells in shown)])
    rows.append(["seconds", *(f"{result['seconds']:.0f}" for result in results)])
    return _table("", ("", "first", "second"), rows)


def _quality(result: ComparedResult) -> dict[str, str]:
    """Figures by heading; none where nothing was evaluated."""
    measure, quality = result["measure"], result["quality"]
    if measure is None or quality is None:
        return {}
    columns = quality_columns({"measure": measure, "original": quality})
    return {name: show(quality) for name, show in columns.items()}


def _notes(found: ComparisonDocument) -> list[str]:
    notes = []
    if not found["same_model"]:
        notes.append("the two were made of different originals")
    if not found["same_rows"]:
        notes.append(
            "the figures are of different report rows; hawqtool evaluate with one --eval-data judges both alike"
        )
    return notes


def _layer(layer: ComparedLayer, prefix: str) -> list[str]:
    first, second = layer["bytes"]
    change = "" if first is None or second is None else f"{second - first:+,}"
    before, after = layer["output_error"]
    times = f"{after / before:.2f}" if before and after is not None else ""
    return [layer["name"].removeprefix(prefix), *(label or "-" for label in layer["formats"]), change, times]


def _prefix(names: Sequence[str]) -> str:
    """Beginning that all names share, up to a dot: what is left fits a line."""
    shared = os.path.commonprefix(list(names))
    return shared[: shared.rfind(".") + 1]


def _value(value: Any) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(value), _LONGEST_VALUE)


def _short(text: str) -> str:
    return one_line(text, _LONGEST_VALUE)


def _table(title: str, headings: Sequence[str], rows: Any) -> Table:
    table = Table(title=title or None)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    return table
