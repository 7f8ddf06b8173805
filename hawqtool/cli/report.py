"""``hawqtool report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import print_json, session


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that hawqtool quantize wrote.")],
    plots: Annotated[
        Optional[Path],
        typer.Option("--plots", help="Also write the figures as PNG files into this folder.", metavar="DIR"),
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Draw report.html into an output folder: one file to look at, without scripts or links to other files.

    Example: hawqtool report ./out

    Example: hawqtool report ./out --plots ./figures
    """
    with session(debug=debug, json=json):
        from hawqtool.pipeline.report import run_report

        written = run_report(folder, plots)
        if json:
            print_json({"schema": "hawqtool.page/1", "files": [str(path) for path in written]})
        else:
            print("\n".join(map(str, written)))
