"""Some of the calibration rows, for roundings that are compared and not kept."""

from __future__ import annotations

from dataclasses import replace

from hawqtool.data.tokens import fingerprint
from hawqtool.records import Rows

EVERY, FEWEST = 4, 32
"""Every fourth calibration row is behind roundings that are compared, 32 at least: noise is alike for all of them."""


def some_rows(rows: Rows) -> Rows:
    """Every fourth row, or more often where these are few, so that all sources have their share."""
    step = _step(len(rows.tokens))
    if step == 1:
        return replace(rows, output_moments={})
    importance = rows.importance and {name: values[::step] for name, values in rows.importance.items()}
    tokens = rows.tokens[::step]
    return Rows(tokens, rows.source, fingerprint(tokens), importance, sources=rows.sources[::step])


def some_count(rows: int) -> int:
    """How many that are of so many rows."""
    return len(range(0, rows, _step(rows)))


def _step(rows: int) -> int:
    return max(1, min(EVERY, rows // FEWEST))
