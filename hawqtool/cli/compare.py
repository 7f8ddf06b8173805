"""``hawqtool compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import print_json, session


def compare(
    first: Annotated[Path, typer.Argument(help="A folder that hawqtool quantize wrote, or its report.json.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    every: Annotated[bool, typer.Option("--all-layers", help="List the layers of equal formats too.")] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show two results side by side: sizes, quality, settings and the format of each layer.

    Example: hawqtool compare ./out-3bit ./out-4bit

    Example: hawqtool compare ./out/report.json ./other/report.json --all-layers
    """
    with session(debug=debug, json=json):
        from hawqtool.cli.render_compare import print_comparison
        from hawqtool.pipeline.compare import run_compare

        found = run_compare(first, second)
        if json:
            print_json(found)
        else:
            print_comparison(found, every)
