"""The ``report`` command: ``report.html`` and PNG figures from the files of an output folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hawqtool.errors import InputError, UsageError
from hawqtool.parsing import ParseError, load_json
from hawqtool.pipeline.run.files import read_report, read_sensitivity
from hawqtool.report.page.figure_data import figure_data
from hawqtool.report.page.html import page
from hawqtool.report.schema import Report

PAGE = "report.html"


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
        return _write(folder, report, plots)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder / 'report.json'} does not go with this version of hawqtool ({error!r}); it was made by "
            f"{report.get('hawqtool_version', 'an unknown version')}"
        ) from error


def write_page(folder: Path) -> None:
    """Write ``report.html`` into a folder that has all its records."""
    _write(folder, read_report(folder / "report.json"), None)


def check_plots(folder: Path) -> None:
    """Check that figures can be written into a folder, which is made later.

    Raises:
        UsageError: If it is a file, or its parent is missing.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--plots {folder} is a file, a folder was expected; choose another name")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"the parent folder of {folder} does not exist; create it first")


def _write(folder: Path, report: Report, plots: Path | None) -> list[Path]:
    # Matplotlib is slow to load, and most commands draw nothing.
    from hawqtool.report.page.drawing import as_svg, save_png
    from hawqtool.report.page.figures import FIGURES, TITLES

    scores = folder / "reproduce/sensitivity.json"
    measured = read_sensitivity(scores)[:2] if scores.is_file() else None
    data, missing = figure_data(report, measured)
    draw = {name: partial(function, data[name]) for name, function in FIGURES.items() if name in data}
    figures = {name: as_svg(figure, name, TITLES[name]) for name, figure in draw.items()}
    written = [folder / PAGE]
    temporary = folder / f".{PAGE}.part"
    temporary.write_text(page(report, figures, missing, _versions(folder)), encoding="utf-8")
    temporary.replace(written[0])
    if plots is not None:
        plots.mkdir(exist_ok=True)
        for name, figure in draw.items():
            written.append(plots / f"{name}.png")
            save_png(figure, written[-1])
    return written


def _versions(folder: Path) -> dict[str, Any]:
    path = folder / "reproduce/packages.json"
    if not path.is_file():
        return {}
    try:
        found = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is not valid JSON: {error}; write the folder again") from None
    return found if isinstance(found, dict) else {}
