"""Tables of scores and of plans for people."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from hawqtool.formats import parse_label
from hawqtool.parsing import printable
from hawqtool.report.documents import PlanDocument, SensitivityDocument
from hawqtool.report.wording import role

_MOST, _LEAST = 8, 4
_PREFERRED = ("projection", "fisher")


def print_scores(document: SensitivityDocument) -> None:
    """Print the most and the least sensitive units at their narrowest width, by the score that allocation prefers."""
    scores = document["scores"]
    metric = next((name for name in (*_PREFERRED, *scores) if name in scores), None)
    if metric is None:
        return
    rows = []
    for unit, by_label in scores[metric].items():
        label = min(by_label, key=lambda text: parse_label(text).bits)
        value, stderr = (*by_label[label], None)[:2]
        if value is not None:
            rows.append((value, stderr, unit, label))
    rows.sort(key=lambda row: -row[0])
    prefix = _prefix([row[2] for row in rows])
    shown = rows if len(rows) <= _MOST + _LEAST else [*rows[:_MOST], None, *rows[-_LEAST:]]
    table = Table(title=f"most and least sensitive units, score {metric}", title_justify="left")
    table.add_column("unit" + (f" (after {prefix})" if prefix else ""), overflow="fold")
    for heading in ("format", "score", "± error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in shown:
        if row is None:
            table.add_row(f"... {len(rows) - _MOST - _LEAST} more ...")
            continue
        value, stderr, unit, label = row
        error = "" if stderr is None or math.isnan(stderr) else f"{stderr:.1e}"
        table.add_row(printable(unit.removeprefix(prefix)), label, f"{value:.2e}", error)
    Console(highlight=False).print(table)


def print_plan(document: PlanDocument) -> None:
    """Print how many linears of each role have which width."""
    widths = sorted({entry["bits"] for entry in document["layers"]})
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    stored: Counter[str] = Counter()
    for entry in document["layers"]:
        counts[role(entry["name"])][entry["bits"]] += 1
        stored[role(entry["name"])] += entry["bytes"]
    table = Table(title="linears of each role by width", title_justify="left")
    table.add_column("role", overflow="fold")
    for heading in (*(f"{bits} bits" for bits in widths), "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, by_width in counts.items():
        cells = [str(by_width[bits] or "") for bits in widths]
        table.add_row(printable(name), *cells, f"{stored[name]:,}")
    Console(highlight=False).print(table)


def _prefix(names: Sequence[str]) -> str:
    """Beginning that all names share, up to a dot."""
    shared = os.path.commonprefix(list(names))
    return shared[: shared.rfind(".") + 1]
