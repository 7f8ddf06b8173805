"""``hawqtool measure``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.ranks import assist, start_ranks
from hawqtool.cli.render_scores import print_scores
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.config import load_config
from hawqtool.runtime.launched import rank


@o.with_settings
def measure(
    values: o.Values,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "sensitivity.json",
    sensitivity: Annotated[
        Optional[str],
        o.narrowed("sensitivity", "fisher, kron, projection or hawq-ggn alone [default: all four]."),
    ] = None,
    preset: o.Preset = None,
    config: o.Config = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Score every unit in every width with fisher, kron, projection and hawq-ggn; write sensitivity.json.

    It chooses nothing: --extra-metrics adds hawq and kl, as does sensitivity: hawq or kl in a file of -c.

    Example: hawqtool measure ./model -o sensitivity.json --bits 2,3,4,8 --group-size 64

    Example: hawqtool measure ./model --extra-metrics hawq --probes 16 --eigenvalues 20
    """
    given = values | {"sensitivity": sensitivity}
    start_ranks(config, given, preset)
    if rank():
        assist(config, given, preset, debug)
        return
    with session(quiet, debug, json, verbose) as terminal:
        settings = load_config(config, given, preset)
        decide_hub_access(settings.data_sources)

        from hawqtool.pipeline.measure import run_measure

        document = run_measure(settings, Path(output), terminal)
        terminal.end()
        if json:
            print_json(document)
        else:
            print_scores(document)
            print(f"{len(document['units'])} units scored with {', '.join(document['scores'])}: {output}")
