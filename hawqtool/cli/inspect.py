"""``hawqtool inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session


def inspect(
    model: Annotated[str, typer.Argument(help="A checkpoint, original or quantized: a folder, or org/name of a hub.")],
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Describe a checkpoint from its headers: layers, sizes at each width, what loads it, or why it is refused.

    Example: hawqtool inspect ./model

    Example: hawqtool inspect ./out --json
    """
    with session(debug=debug):
        decide_hub_access()

        from hawqtool.cli.render_inspect import print_description
        from hawqtool.pipeline.inspecting import run_inspect

        description = run_inspect(model)
        if json:
            print_json(description)
        else:
            print_description(description)
