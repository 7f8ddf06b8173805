"""The figures of ``hawqtool inspect --spectrum``, each drawn from plain numbers; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hawqtool.report.drawing import BLUE, INK, MUTED, ORANGE, VERMILION, error_lengths, scale_values
from hawqtool.report.figures import WIDTH

Data = dict[str, Any]
_LEAST_CEILING = 10.0


def eigenvalues(data: Data) -> Figure:
    """Largest eigenvalues by rank: their magnitudes, with the sign by colour.

    Args:
        data: ``eigenvalues`` (list of ``[value, residual norm]`` by falling magnitude).
    """
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    ranked = list(enumerate(data["eigenvalues"], start=1))
    for label, colour, mark, sign in (("positive", BLUE, "o", 1), ("negative", ORANGE, "s", -1)):
        shown = [(rank, abs(value), residual) for rank, (value, residual) in ranked if sign * value > 0]
        if shown:
            ranks, values, residuals = zip(*shown, strict=True)
            style: Data = {"fmt": mark, "color": colour, "ms": 7, "mec": INK, "mew": 0.7, "ecolor": INK, "capsize": 3}
            axes.errorbar(ranks, values, residuals, label=label, **style)
    if ranked:
        scale_values(axes, "y", [abs(value) for _, (value, _) in ranked if value])
        axes.set_xlim(0.5, max(ranked[-1][0], 5) + 0.5)
        axes.legend(loc="upper right")
    else:
        axes.text(0.5, 0.5, "none converged; raise --iterations", transform=axes.transAxes, ha="center", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("rank by magnitude, of those that converged")
    axes.set_ylabel("magnitude of the Hessian's eigenvalue")
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
    axes.set_ylim(single / 10, _LEAST_CEILING * max(values))
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_formatter(NullFormatter())
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
    for axes in panels:
        _loss_panel(axes, data)
    ordinary, logarithmic = panels
    ordinary.set_ylim(0, 1.25 * top if top > 0 else 1)
    ordinary.set_title("linear axes")
    logarithmic.set_title("logarithmic axes")
    inner = [(a, value) for a, value in zip(data["scales"], data["divergence"], strict=True) if a]
    logarithmic.set_xscale("log")
    ticks = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    logarithmic.xaxis.set_major_locator(FixedLocator(ticks))
    logarithmic.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    logarithmic.xaxis.set_minor_formatter(NullFormatter())
    logarithmic.set_xlim(0.85 * inner[0][0], 1.15 * inner[-1][0])
    scale_values(logarithmic, "y", [v for a, value in inner for v in (value, a**2 * data["quadratic"])])
    figure.supxlabel(f"share a of the rounding error D of {data['format']}", fontsize=10)
    figure.supylabel(data["measure"], fontsize=10)
    figure.legend(*ordinary.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _loss_panel(axes: Axes, data: Data) -> None:
    scales = data["scales"]
    reach = [scales[-1] * step / 200 for step in range(1, 201)]
    axes.plot(reach, [a**2 * data["quadratic"] for a in reach], color=ORANGE, lw=1.6, ls="--", label="a² · ½ Dᵀ F D")
    style: Data = {"fmt": "-o", "color": BLUE, "lw": 1.6, "ms": 5, "mec": INK, "mew": 0.5, "ecolor": INK, "capsize": 3}
    errors = error_lengths(data["stderr"])
    axes.errorbar(scales, data["divergence"], errors, label="measured", **style)


FIGURES: dict[str, Callable[[Data], Figure]] = {"eigenvalues": eigenvalues, "density": density, "loss": loss}
"""File name of each figure to what draws it."""
