"""Figures of a study, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hawqtool.sensitivity.measured_kl import scores_of_pairs
from study.plans import KINDS, plan_rows
from study.scores import by_width

_DPI, _PANEL = 130, 2.6
_WIDEST_METRICS = 6
_COLOURS = dict(zip(KINDS, ("#2b83c4", "#7b3fb3", "#1b1f24", "#9aa3ad", "#d55e00", "#e69f00"), strict=True))
_MARKERS = dict(zip(KINDS, ("o", "D", "s", ".", "v", "^"), strict=True))

Findings = Mapping[str, Any]


def write_plots(folder: Path, findings: Findings) -> None:
    """Write ``scatter.png``, ``spearman.png`` and ``plans.png``, each as far as there is something to draw."""
    if findings["agreement"]:
        scatter(findings).savefig(folder / "scatter.png", dpi=_DPI)
        spearman(findings).savefig(folder / "spearman.png", dpi=_DPI)
    if findings["plans"]:
        plans(findings).savefig(folder / "plans.png", dpi=_DPI)


def scatter(findings: Findings) -> Figure:
    """Predicted against measured divergence of single units: a row per metric, a column per width."""
    truth = scores_of_pairs(findings["truth"])
    panels = {metric: by_width(scores_of_pairs(scores), truth) for metric, scores in findings["scores"].items()}
    widths = list(next(iter(panels.values())))
    figure = Figure((_PANEL * len(widths), _PANEL * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(widths), squeeze=False)
    for row, (metric, found) in zip(axes, panels.items(), strict=True):
        for axis, (bits, (predicted, measured)) in zip(row, found.items(), strict=True):
            usable = (predicted > 0) & (measured > 0)
            if usable.any():
                axis.loglog(measured[usable], predicted[usable], ".", color=_COLOURS["metric"], markersize=4)
                ends = [measured[usable].min(), measured[usable].max()]
                axis.plot(ends, ends, color=_COLOURS["random"], linewidth=0.8)
            axis.set_title(f"{metric}, {bits} bits", fontsize=8)
            axis.tick_params(labelsize=6, which="both")
    figure.supxlabel("measured on held-out rows", fontsize=9)
    figure.supylabel("predicted", fontsize=9)
    return figure


def spearman(findings: Findings) -> Figure:
    """Rank correlation of every metric with the truth, by width, with its interval."""
    agreement = findings["agreement"]
    widths = list(next(iter(agreement.values())))
    figure = Figure((max(6.0, 1.2 * len(widths) * len(agreement) / 2), 3.6), layout="constrained")
    axis = figure.subplots()
    share = 0.8 / len(agreement)
    for number, (metric, found) in enumerate(agreement.items()):
        known = [(place, found[w]) for place, w in enumerate(widths) if found[w]["interval"] is not None]
        values = np.array([entry["spearman"] for _, entry in known], dtype=float)
        ends = np.array([entry["interval"] for _, entry in known], dtype=float).reshape(-1, 2)
        errors = np.maximum(np.stack([values - ends[:, 0], ends[:, 1] - values]), 0)
        places = np.array([place for place, _ in known], dtype=float) + (number - (len(agreement) - 1) / 2) * share
        axis.bar(places, values, share, yerr=errors, capsize=2, label=metric, error_kw={"linewidth": 0.8})
    axis.set_xticks(range(len(widths)), [f"{width} bits" for width in widths])
    axis.set_ylabel("Spearman's rank correlation")
    axis.axhline(0, color=_COLOURS["uniform"], linewidth=0.8)
    axis.legend(fontsize=8, ncols=min(len(agreement), _WIDEST_METRICS), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def plans(findings: Findings) -> Figure:
    """Divergence on held-out rows against stored bits of all plans; each metric is a line of its own."""
    rows = sorted(plan_rows(findings), key=lambda row: row["bpw"])
    figure = Figure((7.5, 5), layout="constrained")
    axis = figure.subplots()
    series: list[tuple[str, int | None, list[dict[str, Any]]]]
    series = [(kind, None, [row for row in rows if row["kind"] == kind]) for kind in KINDS[1:]]
    names = dict.fromkeys(row["name"] for row in rows if row["kind"] == "metric")
    series += [(name, number, [row for row in rows if row["name"] == name]) for number, name in enumerate(names)]
    for name, number, chosen in series:
        axis.errorbar(
            [row["bpw"] for row in chosen],
            [row["divergence"] for row in chosen],
            [row["stderr"] for row in chosen],
            color=_COLOURS[name] if number is None else f"C{number}",
            marker=_MARKERS[name] if number is None else "o",
            linestyle="-" if name == "uniform" else "none" if number is None else ":",
            linewidth=1,
            markersize=5,
            elinewidth=0.8,
            label=name,
        )
    axis.set_yscale("log")
    axis.set_xlabel("stored bits per weight, scales included")
    axis.set_ylabel({"kl": "KL, nats per output", "embedding_error": "relative error"}[findings["measure"]])
    axis.legend(fontsize=8)
    return figure
