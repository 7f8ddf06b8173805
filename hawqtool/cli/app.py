"""The typer application; nothing here imports torch."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Annotated, Any, Optional

import typer

from hawqtool import __version__
from hawqtool.cli import (
    allocate,
    batch,
    compare,
    config,
    evaluate,
    inspect,
    measure,
    presets,
    push,
    quantize,
    report,
    verify,
)
from hawqtool.cli.command import Command, Group
from hawqtool.cli.signals import INTERRUPTED, TERMINATED
from hawqtool.runtime.stdout import accept_any_character, flush_streams

CLOSED_PIPE = 141
"""Exit code of a command whose reader is gone, as shells know it."""

app = typer.Typer(
    name="hawqtool",
    help="Measure how sensitive each layer is, give it the bits it deserves, round, verify, prove that it pays.",
    cls=Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 2 usage or infeasible target, 3 gate failed, 4 input or model, 5 numerical, memory or "
    "disk, 130 interrupted, 141 closed pipe, 143 terminated.",
)
app.command("quantize", cls=Command)(quantize.quantize)
app.command("measure", cls=Command)(measure.measure)
app.command("allocate", cls=Command)(allocate.allocate)
app.command("evaluate", cls=Command)(evaluate.evaluate)
app.command("compare", cls=Command)(compare.compare)
app.command("verify", cls=Command)(verify.verify)
app.command("inspect", cls=Command)(inspect.inspect)
app.command("batch", cls=Command)(batch.batch)
app.command("report", cls=Command)(report.report)
app.command("push", cls=Command)(push.push)
app.command("config", cls=Command)(config.config)
app.command("presets", cls=Command)(presets.presets)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hawqtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        Optional[bool], typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Options of the program itself."""


def _leave(end: SystemExit) -> None:
    """End the process at once where Python would take long, or never come to an end."""
    if end.code in (INTERRUPTED, TERMINATED):
        os._exit(end.code)  # threads of libraries, which Python would wait for, may never end
    if isinstance(end.code, int) and "torch" in sys.modules and not _is_watched():
        atexit._run_exitfuncs()
        os._exit(end.code)  # taking down thousands of modules takes a second


def _is_watched() -> bool:
    """Whether a profiler or the like looks on, which writes what it saw when Python ends."""
    monitoring: Any = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = map(monitoring.get_tool, range(6)) if monitoring is not None else ()
    return sys.gettrace() is not None or sys.getprofile() is not None or any(tools)


def main() -> None:
    """Entry point of the console script."""
    accept_any_character()
    try:
        app()
    except SystemExit as end:
        # typer and rich turn a closed pipe into exit code 1, which stands for bugs.
        if flush_streams() and not isinstance(end.__context__, BrokenPipeError):
            _leave(end)
            raise
    raise SystemExit(CLOSED_PIPE)
