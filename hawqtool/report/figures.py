"""The figures of a report, each drawn from plain numbers; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from hawqtool.report.drawing import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    VERMILION,
    error_lengths,
    number,
    plain,
    scale_values,
)

WIDTH = 7.2
"""Inches of a figure that does not grow with the model."""
BIT_COLOURS = {2: "#fde4a5", 3: "#f9b872", 4: "#ee7f63", 5: "#cf5270", 6: "#9c3a80", 7: "#6a2b82", 8: "#3d1f6b"}
"""Darker means more bits; lightness alone tells them apart."""
_PANEL_COLUMNS, _MAX_PANELS = 2, 16
_CELL_WIDTH, _CELL_HEIGHT = 0.27, 0.32
_LEAST_BITS, _MARK_SHARE = 0.25, 0.035

Data = dict[str, Any]


def frontier(data: Data) -> Figure:
    """Predicted loss of all plans against their stored bits, the shipped one marked.

    Args:
        data: ``hull`` (list of ``[bits per weight, loss]``), ``uniform`` (list of ``[label, bits per weight, loss]``),
            ``shipped`` (``[bits per weight, loss]`` or None), ``unit`` (of the loss).
    """
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    hull, uniform, shipped = data["hull"], data["uniform"], data["shipped"]
    axes.plot(*zip(*hull, strict=True), color=BLUE, lw=2, label="mixed plans (Pareto frontier)")
    if uniform:
        _, bits, losses = zip(*uniform, strict=True)
        axes.plot(bits, losses, "s", color=ORANGE, ms=7, mec=INK, mew=0.6, label="uniform plans")
    for label, x, y in uniform:
        axes.annotate(plain(label), (x, y), (7, 4), textcoords="offset points", fontsize=9.5)
    if shipped:
        axes.plot(*shipped, "*", color=VERMILION, ms=16, mec=INK, mew=0.6, ls="none", label="shipped plan", zorder=5)
    scale_values(axes, "y", [y for _, y in hull] + [y for _, _, y in uniform])
    axes.margins(x=0.1)
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel(f"predicted loss ({data['unit']})")
    axes.legend(loc="upper right")
    return figure


def measured(data: Data) -> Figure:
    """Measured quality of the plans that were really rounded.

    Args:
        data: ``points`` (list of ``{label, bpw, value, stderr, kind}``, kind being ``mixed``, ``uniform`` or
            ``interpolated``), ``shipped`` (label), ``measure`` (heading).
    """
    points = data["points"]
    figure = Figure(figsize=(WIDTH, 3.9))
    axes = figure.subplots()
    ordered = sorted((p["bpw"], p["value"]) for p in points if p["kind"] == "uniform")
    if len(ordered) > 1:
        axes.plot(*zip(*ordered, strict=True), color=ORANGE, lw=1.2, ls="--", zorder=1)
    marks = {"mixed": ("o", BLUE), "uniform": ("s", ORANGE), "interpolated": ("D", "white")}
    # Only error bars hide one another; the interpolated point has none and stays at its place.
    barred = [p for p in points if p["kind"] != "interpolated"]
    moved = dict(zip((p["label"] for p in barred), _side_by_side([p["bpw"] for p in barred]), strict=True))
    for point in points:
        place = moved.get(point["label"], point["bpw"])
        marker, colour = marks[point["kind"]]
        chosen = point["label"] == data["shipped"]
        text = f"{plain(point['label'])}{', shipped' if chosen else ''}: {number(point['value'])}"
        text += "" if point["stderr"] is None else f" ± {number(point['stderr'])}"
        size = 7 if point["kind"] == "interpolated" else 9
        style: Data = {"fmt": marker, "color": colour, "ms": size, "mec": INK, "mew": 0.7, "ecolor": INK, "capsize": 4}
        axes.errorbar(place, point["value"], error_lengths([point["stderr"]]), label=text, **style)
        if chosen:
            axes.plot(place, point["value"], "o", ms=17, mfc="none", mec=VERMILION, mew=1.8)
    axes.set_ylim(0, 1.3 * max(p["value"] + (p["stderr"] or 0) for p in points) or 1)
    middle, reach = _extent([p["bpw"] for p in points])
    axes.set_xlim(middle - 0.65 * reach, middle + 0.65 * reach)
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel(f"measured {data['measure']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    return figure


def bits_map(data: Data) -> Figure:
    """Bits of each block and role.

    Args:
        data: ``roles`` and ``blocks`` (labels) and ``cells`` (``{(role, block): widths}``, rising),
            ``share`` (width to its share of the stored bytes).
    """
    roles, blocks, cells = data["roles"], data["blocks"], data["cells"]
    margin = 0.5 + 0.083 * max(len(plain(role)) for role in roles)
    width = max(WIDTH * 0.75, margin + _CELL_WIDTH * len(blocks))
    figure = Figure(figsize=(width, 1.15 + _CELL_HEIGHT * len(roles)))
    axes = figure.subplots()
    for (role, block), widths in cells.items():
        colour = BIT_COLOURS[round(sum(widths) / len(widths))]
        x, y = blocks.index(block), roles.index(role)
        axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=colour, linewidth=0))
        text = str(widths[0]) if len(widths) == 1 else f"{widths[0]}–{widths[-1]}"
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color=_on(colour))
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(roles) - 0.5, -0.5)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(blocks)), [plain(block, 6) for block in blocks])
    axes.set_yticks(range(len(roles)), [plain(role) for role in roles])
    axes.set_xlabel("block")
    handles = [
        Patch(facecolor=BIT_COLOURS[bits], label=f"{bits} bit: {100 * share:.1f} %")
        for bits, share in data["share"].items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=min(4, len(handles)),
        title="width: share of the stored bytes",
        alignment="left",
    )
    return figure


def bars(data: Data) -> Figure:
    """Named values as horizontal bars, first at the top.

    Args:
        data: ``names``, ``values``, ``errors`` (standard errors or None, may be empty), ``axis`` (label of the values).
    """
    names, values = data["names"], data["values"]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.25 * len(names)))
    axes = figure.subplots()
    errors = error_lengths(data["errors"]) if data["errors"] else None
    places = range(len(names))
    axes.barh(
        places, values, xerr=errors, height=0.68, color=BLUE, error_kw={"ecolor": INK, "capsize": 2.5, "elinewidth": 1}
    )
    ends = [v + (0 if errors is None or math.isnan(errors[i]) else errors[i]) for i, v in enumerate(values)]
    for place, value, end in zip(places, values, ends, strict=True):
        axes.annotate(number(value), (max(end, 0), place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [plain(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(min(0, *ends), max(0, *ends) * 1.14 or 1)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(data["axis"])
    return figure


def predicted_measured(data: Data) -> Figure:
    """Measured against predicted loss of each plan that has both, with the line of equality.

    Args:
        data: ``points`` (list of ``{label, predicted, value, stderr, kind}``), ``measure``, ``unit`` (of the
            prediction).
    """
    points = data["points"]
    figure = Figure(figsize=(WIDTH * 0.85, 4.6))
    axes = figure.subplots()
    for point in points:
        marker, colour = ("o", BLUE) if point["kind"] == "mixed" else ("s", ORANGE)
        axes.errorbar(
            point["predicted"],
            point["value"],
            error_lengths([point["stderr"]]),
            fmt=marker,
            color=colour,
            ms=9,
            mec=INK,
            mew=0.7,
            ecolor=INK,
            capsize=4,
            label=plain(point["label"]),
        )
    both = [p["predicted"] for p in points] + [p["value"] for p in points]
    scale_values(axes, "x", both)
    scale_values(axes, "y", both)
    low, high = axes.get_xlim()
    line = np.geomspace(low, high, 2) if low > 0 else np.linspace(low, high, 200)
    axes.plot(line, line, color=MUTED, lw=1.2, ls="--", label="measured = predicted", zorder=0)
    axes.set_xlabel(f"predicted loss ({data['unit']})")
    axes.set_ylabel(f"measured {data['measure']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def layer_errors(data: Data) -> Figure:
    """Relative output error of each layer by block, beside that of plain rounding; one panel per role.

    Args:
        data: ``roles`` (label to list of ``[block, error, error of plain rounding]``), ``method`` (name of the
            rounding).
    """
    shown = dict(list(data["roles"].items())[:_MAX_PANELS])
    columns = min(_PANEL_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDTH + 1, 0.7 + 1.75 * rows))
    grid: np.ndarray[Any, Any] = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    values = [v for entries in shown.values() for entry in entries for v in entry[1:]]
    for axes, (role, entries) in zip(panels, shown.items(), strict=False):
        blocks, errors, plain_errors = zip(*entries, strict=True)
        axes.plot(blocks, plain_errors, "-o", color=ORANGE, lw=1.2, ms=4, mfc="none", label="plain rounding")
        axes.plot(blocks, errors, "-o", color=BLUE, lw=1.4, ms=4, label=plain(data["method"]))
        axes.set_title(plain(role))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    scale_values(panels[0], "y", values)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for column in range(columns):
        lowest = max(row for row in range(rows) if row * columns + column < len(shown))
        grid[lowest, column].tick_params(labelbottom=True)
    figure.supxlabel("block", fontsize=10)
    figure.supylabel("relative squared output error", fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2)
    return figure


def _extent(values: list[float]) -> tuple[float, float]:
    """Middle and length of the range of bits per weight, which shows no tiny difference as a large one."""
    return (min(values) + max(values)) / 2, max(max(values) - min(values), _LEAST_BITS)


def _side_by_side(values: list[float]) -> list[float]:
    """Places of points along an axis, those that would hide one another moved apart."""
    step = _MARK_SHARE * _extent(values)[1]
    places: list[float] = []
    for value in values:
        place = value
        while any(abs(place - other) < 0.99 * step for other in places):
            place += step
        places.append(place)
    return places


def _on(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(colour)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#101010"


FIGURES: dict[str, Callable[[Data], Figure]] = {
    "frontier": frontier,
    "measured": measured,
    "bits": bits_map,
    "sensitivity": bars,
    "roles": bars,
    "predicted": predicted_measured,
    "layers": layer_errors,
    "timings": bars,
}
"""Name of each figure to what draws it, in the order of the page."""

TITLES = {
    "frontier": "Predicted loss against stored bits per weight",
    "measured": "Measured quality against stored bits per weight",
    "bits": "Bits of each layer, by block and role",
    "sensitivity": "The most sensitive units",
    "roles": "Sensitivity by role",
    "predicted": "Measured against predicted loss",
    "layers": "Relative output error of each layer",
    "timings": "Seconds of each stage",
}
