"""How figures look, and how they become SVG inside a page or PNG files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from hawqtool.report.escape import one_line

INK, MUTED, GRID = "#1b1f24", "#5b6470", "#d9dde3"
"""Colours of text, of secondary text and of lines; a page in dark mode swaps them."""
BLUE, ORANGE, VERMILION = "#2b83c4", "#e69f00", "#d55e00"
"""From the palette of Okabe and Ito, told apart by colour-blind readers; blue is lighter, for dark pages."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""

Draw = Callable[[], Figure]

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures are the same on each machine
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollar signs
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "hawqtool",
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_PNG_DPI = 144
_PIXELS_PER_INCH = 96
_DECADE = 10.0
_POINTS_PER_INCH = 72
_MARK_SIZE, _LETTER_WIDTH, _LETTER_HEIGHT = 9.0, 6.0, 10.0
_GAPS = (5.0, 12.0, 22.0, 34.0, 48.0)
_WAYS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
"""In points: the room that marks and letters take, and how far and in which directions a label may move."""


def as_svg(draw: Draw, prefix: str, title: str) -> str:
    """A figure as an SVG element for the inside of a page.

    Args:
        draw: Makes the figure.
        prefix: What makes its ids unique in the page.
        title: Safe text for those who hear the page.
    """
    with matplotlib.rc_context(_STYLE):
        figure, buffer = draw(), io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    # No comments (they repeat names), no style sheet (it would hold for the whole page), no XML head.
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "line")):
        text = text.replace(colour, f"var(--{variable})")
    width = round(figure.get_figwidth() * _PIXELS_PER_INCH)
    size = f'style="width:{width}px" role="img" aria-label="{title}"'
    body = re.sub(r'\s(width|height)="[\d.]+pt"', "", text[: text.index(">")]) + f" {size}" + text[text.index(">") :]
    return "\n".join(line for line in body.splitlines() if line.strip())


def save_png(draw: Draw, path: Path) -> None:
    """Write a figure, on white, by atomic rename."""
    temporary = path.with_name(f".{path.name}.part")
    with matplotlib.rc_context(_STYLE):
        draw().savefig(temporary, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
    temporary.replace(path)


def plain(text: object, longest: int = 44) -> str:
    """A name as a label: one line, its end kept when it is long, and only characters that the font surely has."""
    shown = "".join(c if c < "\u0250" or c in "·…–×" else "?" for c in one_line(text))
    return shown if len(shown) <= longest else "…" + shown[1 - longest :]


def number(value: float) -> str:
    """Three significant digits, without an exponent where a few zeros do."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2g}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(6, max(0, digits))}f}"


def scale_values(axes: Axes, direction: str, values: Iterable[float]) -> None:
    """A logarithmic axis where all values are positive, else one that is linear around zero."""
    finite = [v for v in values if math.isfinite(v)]
    axis, lowest = (axes.yaxis, axes.set_yscale) if direction == "y" else (axes.xaxis, axes.set_xscale)
    if not finite:
        return
    if min(finite) <= 0:
        largest = max(abs(v) for v in finite)
        if largest:
            # A power of ten: no tick falls inside the linear part, where labels would lie upon one another.
            lowest("symlog", linthresh=_DECADE ** (math.floor(math.log10(largest)) - 2))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_locator(NullLocator())
        return
    lowest("log")
    low, high = min(finite), max(finite)
    margin = max((high / low) ** 0.07, 1.1)
    (axes.set_ylim if direction == "y" else axes.set_xlim)(low / margin, high * margin)
    wide = high / low > _DECADE**2
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 3.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_apart(figure: Figure, axes: Axes, places: Iterable[tuple[float, float, str]]) -> None:
    """Write short texts beside points, clear of each other and of the points; the axes have their final limits.

    Args:
        figure: Of the axes.
        axes: Where the points are.
        places: Coordinates of each point, with its text; an empty one only keeps its place clear.
    """
    figure.draw_without_rendering()  # now the layout is known
    points = _POINTS_PER_INCH / figure.dpi
    left, bottom, right, top = (points * v for v in axes.bbox.extents)
    listed = [(x, y, text, *(points * v for v in axes.transData.transform((x, y)))) for x, y, text in places]
    taken = [_box(x, y, _MARK_SIZE, _MARK_SIZE) for _, _, _, x, y in listed]
    for place_x, place_y, text, x, y in listed:
        wide, high = _LETTER_WIDTH * len(text) + 2, _LETTER_HEIGHT
        for gap, (over, up) in ((gap, way) for gap in _GAPS for way in _WAYS):
            move = over * (wide / 2 + gap), up * (high / 2 + gap)
            box = _box(x + move[0], y + move[1], wide, high)
            if _inside(box, (left, bottom, right, top)) and not any(_overlap(box, other) for other in taken):
                break
        if not text:
            continue
        taken.append(box)
        line: Any = {"arrowstyle": "-", "color": MUTED, "lw": 0.7, "shrinkA": 0, "shrinkB": 0}
        at: Any = {"xytext": move, "textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 9.5}
        axes.annotate(text, (place_x, place_y), arrowprops=line, zorder=6, **at)


def _box(x: float, y: float, wide: float, high: float) -> Box:
    return x - wide / 2, y - high / 2, x + wide / 2, y + high / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def error_lengths(errors: Iterable[float | None]) -> list[float]:
    """Lengths of error bars; NaN, which is not drawn, where the error is not known."""
    return [math.nan if error is None else error for error in errors]
