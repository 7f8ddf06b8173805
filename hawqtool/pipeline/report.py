"""The ``report`` command: ``report.html`` and PNG figures from the files of an output folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hawqtool.errors import InputError, UsageError
from hawqtool.parsing import ParseError, load_json
from hawqtool.pipeline.run.files import read_report, read_sensitivity
from hawqtool.report.page.figure_data import figure_data
from hawqtool.report.page.html import page
from hawqtool.report.schema import Report

PAGE = "report.html"

Drawn = dict[str, str]
"""SVG elements of figures by what they were drawn from."""


def run_report(folder: Path, plots: Path | None = None) -> list[Path]:
    """``hawqtool report``: write the page into an output folder, and its figures into another.

    Args:
        folder: What ``hawqtool quantize`` wrote.
        plots: Folder for PNG files, created if need be; None for none.

    Returns:
        The files that were written, the page first.

    Raises:
        InputError: If the folder is not ours or its records are damaged.
        UsageError: If the folder for the figures cannot be made.
    """
    if not (folder / "report.json").is_file():
        raise InputError(
            f"{folder} has no report.json, so it is no output folder of hawqtool; give one that hawqtool quantize made"
        )
    report = read_report(folder / "report.json")
    if plots is not None:
        check_plots(plots)
    try:
        return _write(folder, report, plots, {})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder / 'report.json'} does not go with this version of hawqtool ({error!r}); it was made by "
            f"{report.get('hawqtool_version', 'an unknown version')}"
        ) from error


def draw_figures(folder: Path, report: Report) -> Drawn:
    """Draw the figures of a report beside which the folder has its scores, while others work: a second on a slow host.

    Returns:
        SVG elements by what they were drawn from.
    """
    data, _ = _figure_data(folder, report)
    return {_key(name, values): _svg(name, values) for name, values in data.items()}


def write_page(folder: Path, drawn: Drawn | None = None) -> None:
    """Write ``report.html`` into a folder that has all its records.

    Args:
        folder: The folder.
        drawn: What `draw_figures` gave; what has changed since is drawn again.
    """
    _write(folder, read_report(folder / "report.json"), None, drawn or {})


def check_plots(folder: Path) -> None:
    """Check that figures can be written into a folder, which is made later.

    Raises:
        UsageError: If it is a file, or its parent is missing.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--plots {folder} is a file, a folder was expected; choose another name")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"the parent folder of {folder} does not exist; create it first")


def _write(folder: Path, report: Report, plots: Path | None, drawn: Drawn) -> list[Path]:
    data, missing = _figure_data(folder, report)
    figures = {name: drawn.get(_key(name, values)) or _svg(name, values) for name, values in data.items()}
    written = [folder / PAGE]
    temporary = folder / f".{PAGE}.part"
    temporary.write_text(page(report, figures, missing, _versions(folder)), encoding="utf-8")
    temporary.replace(written[0])
    if plots is not None:
        from hawqtool.report.page.drawing import save_png
        from hawqtool.report.page.figures import FIGURES

        plots.mkdir(exist_ok=True)
        for name, values in data.items():
            written.append(plots / f"{name}.png")
            save_png(partial(FIGURES[name], values), written[-1])
    return written


def _figure_data(folder: Path, report: Report) -> tuple[dict[str, Any], dict[str, str]]:
    """As `figure_data`, in the order of the page, with the scores that lie in the folder."""
    from hawqtool.report.page.figures import FIGURES

    scores = folder / "reproduce/sensitivity.json"
    data, missing = figure_data(report, read_sensitivity(scores)[:2] if scores.is_file() else None)
    return {name: data[name] for name in FIGURES if name in data}, missing


def _svg(name: str, values: Any) -> str:
    # Matplotlib is slow to load, and most commands draw nothing.
    from hawqtool.report.page.drawing import as_svg
    from hawqtool.report.page.figures import FIGURES, TITLES

    return as_svg(partial(FIGURES[name], values), name, TITLES[name])


def _key(name: str, values: Any) -> str:
    """What a figure is drawn from, the same before and after it was written as JSON."""
    return f"{name} {_listed(values)!r}"


def _listed(values: Any) -> Any:
    """Numbers and texts in lists alone, whatever holds them."""
    if isinstance(values, dict):
        return [[_listed(key), _listed(value)] for key, value in values.items()]
    if isinstance(values, np.ndarray):
        return values.tolist()
    return [_listed(value) for value in values] if isinstance(values, list | tuple) else values


def _versions(folder: Path) -> dict[str, Any]:
    path = folder / "reproduce/packages.json"
    if not path.is_file():
        return {}
    try:
        found = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is not valid JSON: {error}; write the folder again") from None
    return found if isinstance(found, dict) else {}
