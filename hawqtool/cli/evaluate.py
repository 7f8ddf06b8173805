"""``hawqtool evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.ranks import assist, start_ranks
from hawqtool.cli.render import quality_lines
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.config import load_config
from hawqtool.errors import UsageError
from hawqtool.report.verdict import FEW_ROWS_TEXT, verdict, verdict_text
from hawqtool.runtime.launched import rank, world_size


@o.with_settings
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A quantized folder, or a GGUF file that hawqtool wrote.")],
    against: Annotated[str, typer.Option("--against", help="The original: a folder or a hub id.", metavar="MODEL")],
    values: o.Values,
    eval_data: Annotated[
        Optional[str],
        o.narrowed("eval_data", "Text to evaluate on, of any kind but self; needed: a folder knows none."),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Perplexity, KL and same-top-1 of a quantized folder against its original, read back from the files.

    Example: hawqtool evaluate ./out --against ./model --eval-data text.txt
    """
    from hawqtool.checkpoint.gguf.header import is_gguf

    given, one_file = values | {"model": against, "eval_data": eval_data}, is_gguf(folder)
    if not one_file:
        start_ranks(None, given, None)
    if rank() and not one_file:
        assist(None, given, None, debug, folder)
        return
    with session(quiet, debug, json, verbose) as terminal:
        settings = load_config(None, given)
        decide_hub_access(settings.data_sources)
        if one_file and max(settings.gpus, world_size()) > 1:
            raise UsageError(f"a GGUF file is evaluated in one process, found --gpus {settings.gpus}; drop it")

        from hawqtool.pipeline.evaluate import run_evaluate
        from hawqtool.pipeline.gguf.evaluation import evaluate_gguf

        result = (evaluate_gguf if is_gguf(folder) else run_evaluate)(settings, folder, terminal)
        terminal.end()
        if json:
            print_json(result)
            return
        found = verdict(result["original"], result["quantized"], result["rows"]["count"])
        print("\n".join([*quality_lines(result), f"{'verdict':15s} {verdict_text(found)}"]))
        if found["few_rows"]:
            print(f"{'':15s} {FEW_ROWS_TEXT}")
