"""The ``report`` command: ``report.html`` and PNG figures from the files of an output folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hawqtool.errors import InputError, UsageError
from hawqtool.parsing import ParseError, load_json
from hawqtool.pipeline.run.files import read_report, read_sensitivity
from hawqtool.report.page.drawing_processes import DrawingProcesses, figure_svg
from hawqtool.report.page.figure_data import FIGURE_NAMES, figure_data
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


class FiguresAhead:
    """Figures of a page that processes draw while others work; without processes there are none.

    Args:
        processes: They draw; started by whoever has time for that.
    """

    def __init__(self, processes: DrawingProcesses) -> None:
        self._processes = processes
        self._drawn: Drawn = {}
        self._begun: Callable[[], Drawn] = dict

    def begin(self, folder: Path, report: Report) -> None:
        """Have the figures of a report drawn, beside which the folder has its scores, as far as they are not yet."""
        if not self._processes:
            return
        data, _ = _figure_data(folder, report)
        known = self.finish()
        left = {name: values for name, values in data.items() if _key(name, values) not in known}
        keys = {name: _key(name, values) for name, values in left.items()}  # the report may change meanwhile
        drawn = self._processes.begin(left)
        self._begun = lambda: {keys[name]: svg for name, svg in drawn().items()}

    def finish(self) -> Drawn:
        """Wait for them: SVG elements by what they were drawn from."""
        self._drawn |= self._begun()
        self._begun = dict
        return self._drawn


def write_page(folder: Path, drawn: Drawn | None = None) -> None:
    """Write ``report.html`` into a folder that has all its records.

    Args:
        folder: The folder.
        drawn: What was drawn ahead (see `FiguresAhead`); what has changed since is drawn again.
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
    figures = {name: drawn.get(_key(name, values)) or figure_svg(name, values) for name, values in data.items()}
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
    scores = folder / "reproduce/sensitivity.json"
    data, missing = figure_data(report, read_sensitivity(scores)[:2] if scores.is_file() else None)
    return {name: data[name] for name in FIGURE_NAMES if name in data}, missing


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
