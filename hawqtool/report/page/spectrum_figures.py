"""The figures of ``hawqtool inspect --spectrum``, each drawn from plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hawqtool.report.page.drawing import BLUE, INK, MUTED, ORANGE, VERMILION, error_lengths, number, scale_values
from hawqtool.report.page.figures import WIDTH

Data = dict[str, Any]
_CEILING, _LABELLED = 10.0, 12


def eigenvalues(data: Data) -> Figure:
    """Largest eigenvalues by rank.

    Args:
        data: ``eigenvalues`` (list of ``[value, residual norm]`` by falling magnitude).
    """
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    ranked = list(enumerate(data["eigenvalues"], start=1))
    for label, colour, sign in (("positive", BLUE, 1), ("negative", ORANGE, -1)):
        shown = [(rank, value, residual) for rank, (value, residual) in ranked if sign * value > 0]
        if shown:
            ranks, values, residuals = zip(*shown, strict=True)
            style: Data = {"error_kw": {"ecolor": INK, "capsize": 3, "elinewidth": 1}}
            axes.bar(ranks, values, width=0.6, color=colour, yerr=residuals, label=label, **style)
    for rank, (value, _) in ranked[:_LABELLED]:
        place: Data = {"textcoords": "offset points", "ha": "center", "va": "bottom" if value > 0 else "top"}
        axes.annotate(number(value), (rank, value), (0, 4 if value > 0 else -4), fontsize=9, **place)
    axes.axhline(0, color=MUTED, lw=1)
    axes.margins(y=0.12)
    axes.set_xlim(0.4, max(len(ranked), 5) + 0.6)
    if ranked:
        axes.legend(loc="upper right")
    else:
        axes.text(0.5, 0.6, "none converged; raise --iterations", transform=axes.transAxes, ha="center", color=MUTED)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("rank by magnitude, of those that converged")
    axes.set_ylabel("eigenvalue of the Hessian")
    return figure


def density(data: Data) -> Figure:
    """Smoothed spectral density on a logarithmic axis.

    Args:
        data: ``grid``, ``density``, ``single`` (height of one eigenvalue of all, as widened).
    """
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    grid, values, single = data["grid"], data["density"], data["single"]
    axes.fill_between(grid, values, single / 10, where=[v > single / 10 for v in values], color=BLUE, alpha=0.18, lw=0)
    axes.plot(grid, values, color=BLUE, lw=1.6, label="density")
    axes.axhline(single, color=MUTED, lw=1.2, ls="--", label="height of one single eigenvalue")
    axes.axvline(0, color=VERMILION, lw=1, ls=":", label="zero")
    axes.set_yscale("log")
    axes.set_ylim(single / 10, _CEILING * max(values))
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(grid[0], grid[-1])
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density (integral 1)")
    axes.legend(loc="upper right")
    return figure


def loss(data: Data) -> Figure:
    """Measured divergence along the rounding error beside the quadratic, on linear and on logarithmic axes.

    Args:
        data: ``scales``, ``divergence``, ``stderr``, ``quadratic`` (at 1), ``measure`` (heading), ``format`` (label).
    """
    figure = Figure(figsize=(WIDTH + 1, 3.9))
    panels = figure.subplots(1, 2)
    top = max(data["divergence"])
    ordinary, logarithmic = panels
    _loss_panel(ordinary, data, 0)
    _loss_panel(logarithmic, data, 1)
    ordinary.set_ylim(0, 1.25 * top if top > 0 else 1)
    ordinary.set_title("linear axes")
    logarithmic.set_title("logarithmic axes")
    inner = [(a, value) for a, value in zip(data["scales"], data["divergence"], strict=True) if a]
    logarithmic.set_xscale("log")
    ticks = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    logarithmic.xaxis.set_major_locator(FixedLocator(ticks))
    logarithmic.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    logarithmic.xaxis.set_minor_locator(NullLocator())
    logarithmic.set_xlim(0.85 * inner[0][0], 1.15 * inner[-1][0])
    scale_values(logarithmic, "y", [v for a, value in inner for v in (value, a**2 * data["quadratic"])])
    figure.supxlabel(f"share a of the rounding error D of {data['format']}", fontsize=10)
    figure.supylabel(data["measure"], fontsize=10)
    ordinary.legend(loc="upper left")
    return figure


def _loss_panel(axes: Axes, data: Data, first: int) -> None:
    """Both curves from a point on: a logarithmic axis has no zero."""
    scales, values = data["scales"][first:], data["divergence"][first:]
    reach = [scales[0] + (scales[-1] - scales[0]) * step / 200 for step in range(201)]
    axes.plot(reach, [a**2 * data["quadratic"] for a in reach], color=ORANGE, lw=1.6, ls="--", label="a² · ½ DᵀFD")
    style: Data = {"fmt": "-o", "color": BLUE, "lw": 1.6, "ms": 5, "mec": INK, "mew": 0.5, "ecolor": INK, "capsize": 3}
    axes.errorbar(scales, values, error_lengths(data["stderr"][first:]), label="measured at W + a D", **style)


FIGURES: dict[str, Callable[[Data], Figure]] = {"eigenvalues": eigenvalues, "density": density, "loss": loss}
"""File name of each figure to what draws it."""
