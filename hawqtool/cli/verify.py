"""``hawqtool verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder or a GGUF file that hawqtool wrote.")],
    against: Annotated[
        Optional[str], typer.Option("--against", help="The original: a folder or a hub id.", metavar="MODEL")
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Check every file, tensor, size, fused set and target of a written folder; exit 0 or 4.

    Problems are printed one a line.

    Example: hawqtool verify ./out --against ./model

    Example: hawqtool verify out.gguf --against ./model
    """
    with session(debug=debug, json=json) as terminal:
        decide_hub_access()
        from hawqtool.checkpoint.gguf.header import is_gguf
        from hawqtool.checkpoint.source import locate
        from hawqtool.errors import InputError
        from hawqtool.export.verify import verify_folder
        from hawqtool.parsing import printable
        from hawqtool.pipeline.gguf.verification import verify_gguf

        if is_gguf(folder):
            report = verify_gguf(folder, against)
        else:
            report = verify_folder(folder, None if against is None else locate(against).folder)
        if json:
            terminal.answered = True
            print_json(
                {"schema": "hawqtool.verify/1", "problems": list(report.problems), "tensors": report.num_tensors}
            )
        elif not report.problems:
            print(
                f"{report.num_tensors} tensors, {report.num_packed} packed layers, {report.total_bytes:,} bytes: "
                "no problem found"
            )
        if report.problems:
            if not json:
                for problem in report.problems:
                    print(printable(problem))
            raise InputError(f"{len(report.problems)} problems in {folder}, first: {report.problems[0]}")
