"""``hawqtool inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.config import load_config
from hawqtool.errors import UsageError

PANEL = "Spectrum"


@o.with_settings
def inspect(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, original or quantized: a folder, org/name of a hub, or a GGUF file.")
    ],
    values: o.Values,
    spectrum: Annotated[
        bool,
        typer.Option(
            "--spectrum",
            help="Also measure, on calibration rows, the Hessian's spectrum and the loss along the rounding error; "
            "takes minutes.",
        ),
    ] = False,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the spectrum's loss.", rich_help_panel=PANEL)] = 3,
    iterations: Annotated[
        int,
        typer.Option(
            "--iterations",
            min=2,
            help="Lanczos iterations per start, each one Hessian-vector product; more find more eigenvalues.",
            rich_help_panel=PANEL,
        ),
    ] = 12,
    starts: Annotated[
        int,
        typer.Option(
            "--starts",
            min=1,
            help="Random first vectors behind density and means; more lower their error.",
            rich_help_panel=PANEL,
        ),
    ] = 2,
    width: Annotated[
        int,
        typer.Option(
            "--width", min=2, max=8, help="Bits of the rounding error that the loss follows.", rich_help_panel=PANEL
        ),
    ] = 3,
    plots: Annotated[
        Optional[Path],
        typer.Option(
            "--plots", help="Write figures as PNG files into this folder.", metavar="DIR", rich_help_panel=PANEL
        ),
    ] = None,
    rounding: Annotated[
        Optional[str],
        typer.Option(
            "--rounding",
            help="rtn, gptq or foem; all but rtn with Gram matrices of --num-samples calibration rows.",
            rich_help_panel=PANEL,
        ),
    ] = "rtn",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Describe a checkpoint from its headers: layers, sizes at each width, what loads it, or why it is refused.

    Example: hawqtool inspect ./model

    Example: hawqtool inspect ./out --json

    Example: hawqtool inspect model-Q4_K_M.gguf

    Example: hawqtool inspect ./model --spectrum --calibration text.txt --seq-len 64 --plots ./figures
    """
    with session(quiet, debug, json) as terminal:
        if plots is not None and not spectrum:
            raise UsageError("--plots draws what --spectrum measures; give both")
        settings = load_config(None, values | {"model": model, "rounding": rounding})
        decide_hub_access(settings.data_sources if spectrum else ())

        from hawqtool.cli.render_inspect import print_description, print_spectrum
        from hawqtool.pipeline.inspection.checkpoint import run_inspect

        description = run_inspect(model)
        if spectrum and description["kind"] == "gguf":
            raise UsageError(f"--spectrum runs the model, and {model} is a GGUF file; give the original's folder")
        if spectrum:
            from hawqtool.pipeline.spectrum import SpectrumSettings, run_spectrum

            wanted = SpectrumSettings(rows, iterations, starts, width, plots)
            description["spectrum"] = run_spectrum(settings, wanted, terminal)
            terminal.end()
        if json:
            print_json(description)
            return
        print_description(description)
        if spectrum:
            print_spectrum(description["spectrum"])
