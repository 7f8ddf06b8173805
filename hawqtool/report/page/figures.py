"""The figures of a report, each drawn from plain numbers."""

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

from hawqtool.report.page.drawing import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    VERMILION,
    error_lengths,
    label_apart,
    number,
    plain,
    scale_values,
)

WIDTH = 7.2
"""Inches of a figure that does not grow with the model."""
BIT_COLOURS = {
    2: "#fde4a5",
    3: "#f9b872",
    4: "#ee7f63",
    5: "#cf5270",
    6: "#9c3a80",
    7: "#6a2b82",
    8: "#3d1f6b",
    16: "#140a26",
}
"""Darker means more bits; lightness alone tells them apart."""
_PANEL_COLUMNS, _MAX_PANELS = 2, 16
_CELL_WIDTH, _CELL_HEIGHT = 0.27, 0.32
_LEAST_BITS, _MARK_SHARE = 0.25, 0.03
_FIXED = ("uniform", "mixed")
"""Uniform plans, which a line joins, stay where they are."""
_LEGEND_LINE = 0.2
_LONGEST_MARK = 14
_BAR_PARTS = 15
_WIDE_RANGE = 8
"""Ratio of measured values beyond which their axis is logarithmic."""
_MARKS = {
    "mixed": ("o", BLUE, 8),
    "uniform": ("s", ORANGE, 8),
    "searched": ("o", "white", 6),
}
"""Marker, colour and size of each kind of plan."""

Data = dict[str, Any]


def frontier(data: Data) -> Figure:
    """Predicted loss of all plans against their stored bits, those that were tried marked.

    Args:
        data: ``hull`` (list of ``[bits per weight, loss]``), ``uniform`` (list of ``[label, bits per weight, loss]``),
            ``plans`` (tried ones, list of ``{mark, kind, bpw, predicted, shipped}``), ``unit`` (of the loss).
    """
    figure = Figure(figsize=(WIDTH, 4.7))
    axes = figure.subplots()
    hull, uniform = data["hull"], data["uniform"]
    mixed = [plan for plan in data["plans"] if plan["kind"] == "mixed"]
    axes.plot(*zip(*hull, strict=True), color=BLUE, lw=2, label="best plan of each size (Pareto frontier)")
    if uniform:
        _, bits, losses = zip(*uniform, strict=True)
        axes.plot(bits, losses, "s", color=ORANGE, ms=7, mec=INK, mew=0.6, label="uniform plans")
    if mixed:
        places = [plan["bpw"] for plan in mixed], [plan["predicted"] for plan in mixed]
        axes.plot(*places, "o", color=BLUE, ms=7, mec=INK, mew=0.6, label="mixed plans that were tried", zorder=4)
    for plan in data["plans"]:
        if plan["shipped"]:
            _ring(axes, plan["bpw"], plan["predicted"], "shipped plan")
    marked = [(plan["bpw"], plan["predicted"], plan["mark"]) for plan in mixed]
    scale_values(axes, "y", [y for _, y in hull] + [y for _, _, y in uniform] + [y for _, y, _ in marked])
    axes.margins(x=0.1)
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel(f"predicted loss ({data['unit']})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    marked += [(x, y, "") for x, y in hull]  # labels stay clear of the line
    label_apart(figure, axes, marked + [(x, y, plain(label, _LONGEST_MARK)) for label, x, y in uniform])
    return figure


def measured(data: Data) -> Figure:
    """Measured quality of the plans that were really rounded.

    Args:
        data: ``points`` (list of ``{mark, label, bpw, value, stderr, kind, shipped}``, kind being a key of `_MARKS`),
            ``measure`` (heading).
    """
    points = data["points"]
    figure = Figure(figsize=(WIDTH, 3.3 + _LEGEND_LINE * len(points)))
    axes = figure.subplots()
    ordered = sorted((p["bpw"], p["value"]) for p in points if p["kind"] == "uniform")
    if len(ordered) > 1:
        axes.plot(*zip(*ordered, strict=True), color=ORANGE, lw=1.2, ls="--", zorder=1)
    moved = _side_by_side(points)  # so that no error bar hides another
    places = [moved.get(point["label"], point["bpw"]) for point in points]
    for place, point in zip(places, points, strict=True):
        text = f"{plain(point['label'])}{', shipped' * point['shipped']}: {number(point['value'])}"
        text += "" if point["stderr"] is None else f" ± {number(point['stderr'])}"
        _errorbar(axes, place, point, text)
    lowest, highest = min(p["value"] for p in points), max(p["value"] + (p["stderr"] or 0) for p in points)
    if 0 < _WIDE_RANGE * lowest < highest:
        scale_values(axes, "y", [lowest, highest])
    else:
        axes.set_ylim(0, 1.3 * highest or 1)
    middle, reach = _extent(places)
    axes.set_xlim(middle - 0.65 * reach, middle + 0.65 * reach)
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel(f"measured {data['measure']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    label_apart(figure, axes, _marks(places, points))
    return figure


def search(data: Data) -> Figure:
    """Measured divergence of the plans of a search against their stored bits, with the bound.

    Args:
        data: ``bpw`` (stored bits per weight, rising), ``series`` (set of rows to the divergence at each of them),
            ``bound``, ``measure`` (heading).
    """
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    for (role, values), (marker, colour) in zip(data["series"].items(), (("o", BLUE), ("s", ORANGE)), strict=False):
        axes.plot(data["bpw"], values, marker=marker, color=colour, lw=1, mec=INK, mew=0.6, label=f"{role} rows")
    bound = data["bound"]
    axes.axhline(bound, color=VERMILION, lw=1.4, ls="--", label=f"bound: {number(bound)}", zorder=1)
    scale_values(axes, "y", [bound, *(value for values in data["series"].values() for value in values)])
    middle, reach = _extent(data["bpw"])
    axes.set_xlim(middle - 0.6 * reach, middle + 0.6 * reach)
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel(f"measured {data['measure']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
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
        mean = round(sum(widths) / len(widths))
        colour = BIT_COLOURS[min(BIT_COLOURS, key=lambda bits: abs(bits - mean))]
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
        data: ``names``, ``values``, ``errors`` (standard errors or None, may be empty), ``axis`` (label of the values),
            ``title`` (may be missing).
    """
    names, values = data["names"], data["values"]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.25 * len(names)))
    axes = figure.subplots()
    errors = error_lengths(data["errors"]) if data["errors"] else None
    places = range(len(names))
    axes.barh(
        places, values, xerr=errors, height=0.68, color=BLUE, error_kw={"ecolor": INK, "capsize": 2.5, "elinewidth": 1}
    )
    lengths = [0.0] * len(values) if errors is None else [0.0 if math.isnan(e) else e for e in errors]
    right = [value + length for value, length in zip(values, lengths, strict=True)]
    for place, value, end in zip(places, values, right, strict=True):
        axes.annotate(number(value), (max(end, 0), place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [plain(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    lowest = min(0, *(value - length for value, length in zip(values, lengths, strict=True)))
    highest = max(0, *right)
    # Room for the numbers at the right.
    axes.set_xlim(1.03 * lowest, highest + 0.14 * (highest - lowest) or 1)
    axes.set_title(data.get("title", ""))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(data["axis"])
    return figure


def predicted_measured(data: Data) -> Figure:
    """Measured against predicted loss of each plan that has both, with the line of equality.

    Args:
        data: ``points`` (list of ``{mark, label, predicted, value, stderr, kind, shipped}``), ``measure``, ``unit``
            (of the prediction).
    """
    points = data["points"]
    labels = list(dict.fromkeys(point["label"] for point in points))
    figure = Figure(figsize=(WIDTH * 0.85, 4.0 + _LEGEND_LINE * math.ceil((len(labels) + 1) / 2)))
    axes = figure.subplots()
    for point in points:
        # A label of many points stands in the legend once.
        text = plain(point["label"]) + ", shipped" * point["shipped"] if point["label"] in labels else None
        labels = [label for label in labels if label != point["label"]]
        _errorbar(axes, point["predicted"], point, text)
    both = [v for p in points for v in (p["predicted"], p["value"], p["value"] + (p["stderr"] or 0))]
    both += [low for p in points if (low := p["value"] - (p["stderr"] or 0)) > 0]
    scale_values(axes, "x", both)
    scale_values(axes, "y", both)
    low, high = axes.get_xlim()
    line = np.geomspace(low, high, 2) if low > 0 else np.linspace(low, high, 200)
    axes.plot(line, line, color=MUTED, lw=1.2, ls="--", label="measured = predicted", zorder=0)
    axes.set_xlabel(f"predicted loss ({data['unit']})")
    axes.set_ylabel(f"measured {data['measure']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    label_apart(figure, axes, _marks([point["predicted"] for point in points], points))
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


def _marks(places: list[float], points: list[Data]) -> list[tuple[float, float, str]]:
    """What `label_apart` needs to write marks that stay clear of the error bars."""
    marked = [(x, p["value"], plain(p["mark"], _LONGEST_MARK)) for x, p in zip(places, points, strict=True)]
    for place, point in zip(places, points, strict=True):
        lengths = np.linspace(-1, 1, _BAR_PARTS) * (point["stderr"] or 0)
        marked += [(place, point["value"] + length, "") for length in lengths.tolist()]
    return marked


def _errorbar(axes: Axes, place: float, point: Data, text: str | None) -> None:
    marker, colour, size = _MARKS[point["kind"]]
    style: Data = {"fmt": marker, "color": colour, "ms": size, "mec": INK, "mew": 0.7, "ecolor": INK, "capsize": 3}
    axes.errorbar(place, point["value"], error_lengths([point["stderr"]]), label=text, **style)
    if point["shipped"]:
        _ring(axes, place, point["value"], None)


def _ring(axes: Axes, x: float, y: float, text: str | None) -> None:
    axes.plot(x, y, "o", ms=15, mfc="none", mec=VERMILION, mew=1.8, ls="none", label=text, zorder=5)


def _extent(values: list[float]) -> tuple[float, float]:
    """Middle and length of the range of bits per weight, which shows no tiny difference as a large one."""
    return (min(values) + max(values)) / 2, max(max(values) - min(values), _LEAST_BITS)


def _side_by_side(points: list[Data]) -> dict[str, float]:
    """Place of each label along the axis of bits: marks that would hide one another apart, uniform ones moved least."""
    step = _MARK_SHARE * _extent([point["bpw"] for point in points])[1]
    places: dict[str, float] = {}
    for point in sorted(points, key=lambda point: _FIXED.index(point["kind"])):
        tries = (point["bpw"] + side * number * step for number in range(len(points) + 1) for side in (1, -1))
        places[point["label"]] = next(x for x in tries if all(abs(x - y) > 0.99 * step for y in places.values()))
    return places


def _on(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(colour)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#101010"


FIGURES: dict[str, Callable[[Data], Figure]] = {
    "frontier": frontier,
    "measured": measured,
    "search": search,
    "bits": bits_map,
    "sensitivity": bars,
    "roles": bars,
    "predicted": predicted_measured,
    "layers": layer_errors,
    "timings": bars,
}
"""Name of each figure to what draws it."""

TITLES = {
    "frontier": "Predicted loss against stored bits per weight",
    "measured": "Measured quality against stored bits per weight",
    "search": "Divergence of the plans of the search against stored bits per weight",
    "bits": "Bits of each layer, by block and role",
    "sensitivity": "The most sensitive units",
    "roles": "Sensitivity by role",
    "predicted": "Measured against predicted loss",
    "layers": "Relative output error of each layer",
    "timings": "Seconds of each stage",
}
