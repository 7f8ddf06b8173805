"""``hawqtool push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.report.wording import size


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that hawqtool quantize wrote.")],
    repository: Annotated[str, typer.Argument(help="Repository of the hub, org/name; created where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    revision: Annotated[
        Optional[str], typer.Option("--revision", help="Branch; created where it is missing.", metavar="BRANCH")
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Verify an output folder and upload it to a model hub in one commit; what verify refuses is not uploaded.

    A token that may write there comes from `hf auth login` or HF_TOKEN.

    Example: hawqtool push ./out my-org/my-model-3.5bit --private
    """
    with session(debug=debug, json=json):
        decide_hub_access()
        from hawqtool.pipeline.push import run_push

        found = run_push(folder, repository, private, revision)
        if json:
            print_json(found)
            return
        print(f"{found['files']} files, {size(found['bytes'])}: {found['url']}, commit {found['commit']}")
