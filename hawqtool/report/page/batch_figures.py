"""The figure of a batch, drawn from plain numbers."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hawqtool.report.page.drawing import (
    BLUE,
    INK,
    ORANGE,
    VERMILION,
    error_lengths,
    label_apart,
    number,
    plain,
    scale_values,
)
from hawqtool.report.page.figures import WIDTH
from hawqtool.report.wording import MEASURES

Data = dict[str, Any]
_LEGEND_LINE, _MEGABYTE, _MARGIN = 0.2, 1e6, 0.08


def pareto(data: Data) -> Figure:
    """Measured divergence of all jobs of a model against the size of their files, the Pareto front joined by a line.

    Args:
        data: ``model``, ``measure`` (key of `MEASURES`), ``same_rows`` (whether all were judged on the same rows),
            ``points`` (list of ``{name, bytes, value, stderr, passed, best}``) and ``uniform`` (pairs of bytes and
            value of the uniform plans beside them).
    """
    points = data["points"]
    figure = Figure(figsize=(WIDTH, 3.9 + _LEGEND_LINE * len(points)))
    axes = figure.subplots()
    best = sorted((p["bytes"], p["value"]) for p in points if p["best"])
    axes.plot(*zip(*best, strict=True), color=BLUE, lw=1.4, label="Pareto front of the jobs", zorder=1)
    if data["uniform"]:
        style: Data = {"color": ORANGE, "ms": 6, "mec": INK, "mew": 0.6, "label": "best uniform plans that fit"}
        axes.plot(*zip(*data["uniform"], strict=True), "s", zorder=2, **style)
    for mark, point in enumerate(points, 1):
        text = f"{mark}: {plain(point['name'])}, {number(point['value'])}" + ", gate failed" * (not point["passed"])
        bars: Data = {"yerr": error_lengths([point["stderr"]]), "ecolor": INK, "capsize": 3, "label": text}
        colour = BLUE if point["passed"] else VERMILION
        axes.errorbar(point["bytes"], point["value"], fmt="o", color=colour, ms=7, mec=INK, mew=0.7, zorder=3, **bars)
    values = [p["value"] for p in points] + [value for _, value in data["uniform"]]
    ends = [p["value"] + sign * (p["stderr"] or 0) for p in points for sign in (1, -1)]
    values += [end for end in ends if end > 0]
    scale_values(axes, "y", values)
    sizes = [p["bytes"] for p in points] + [size for size, _ in data["uniform"]]
    reach = max(max(sizes) - min(sizes), _MARGIN * max(sizes))
    axes.set_xlim(min(sizes) - _MARGIN * reach, max(sizes) + _MARGIN * reach)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / _MEGABYTE:g}"))
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel(f"measured {MEASURES[data['measure']]}")
    note = "" if data["same_rows"] else " (judged on different rows)"
    axes.set_title(f"{plain(data['model'])}{note}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    places = [(p["bytes"], p["value"], str(mark)) for mark, p in enumerate(points, 1)]
    label_apart(figure, axes, places + [(size, value, "") for size, value in data["uniform"]])
    return figure
