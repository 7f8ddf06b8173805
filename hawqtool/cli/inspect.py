"""``hawqtool inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session


def inspect(
    model: Annotated[str, typer.Argument(help="A checkpoint, original or quantized: a folder, or org/name of a hub.")],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Also measure the Hessian's spectrum on calibration rows; takes minutes.")
    ] = False,
    calibration: o.Calibration = None,
    seq_len: o.SeqLen = None,
    device: o.Device = None,
    seed: o.Seed = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Describe a checkpoint from its headers: layers, sizes at each width, what loads it, or why it is refused.

    Example: hawqtool inspect ./model

    Example: hawqtool inspect ./out --json

    Example: hawqtool inspect ./model --spectrum --calibration text.txt
    """
    values = {"calibration": calibration, "seq_len": seq_len, "device": device, "seed": seed}
    with session(quiet, debug) as terminal:
        from hawqtool.config import load_config

        settings = load_config(None, {"model": model, **values})
        decide_hub_access(settings.data_sources if spectrum else ())

        from hawqtool.cli.render_inspect import print_description, print_spectrum
        from hawqtool.pipeline.inspecting import run_inspect

        description = run_inspect(model)
        if spectrum:
            from hawqtool.pipeline.spectrum import run_spectrum

            description["spectrum"] = run_spectrum(settings, terminal)
            terminal.close()
        if json:
            print_json(description)
            return
        print_description(description)
        if spectrum:
            print_spectrum(description["spectrum"])
