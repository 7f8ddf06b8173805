"""``hawqtool allocate``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session


def allocate(
    sensitivity_file: Annotated[Path, typer.Argument(metavar="SENSITIVITY", help="A sensitivity.json.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "plan.json",
    target_bpw: o.TargetBpw = None,
    target_size: o.TargetSize = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    pin: o.Pin = None,
    ignore: o.Ignore = None,
    sensitivity: Annotated[
        str | None, typer.Option("--sensitivity", help="auto, fisher, kron, projection, hawq-ggn, hawq or kl.")
    ] = None,
    solver: o.Solver = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Choose the bits of every unit under a budget from a saved measurement; write plan.json.

    Example: hawqtool allocate sensitivity.json --target-bpw 3.5 --group-size 64 -o plan.json
    """
    values: dict[str, Any] = {
        k: v for k, v in locals().items() if k not in {"sensitivity_file", "output", "json", "debug"}
    }
    with session(debug=debug) as terminal:
        decide_hub_access()
        from hawqtool.config import load_config

        settings = load_config(None, values | {"model": str(sensitivity_file)})

        from hawqtool.pipeline.allocating import run_allocate

        document = run_allocate(settings, sensitivity_file, Path(output), terminal)
        if json:
            print_json(document)
            return
        histogram = Counter(entry["bits"] for entry in document["layers"])
        shares = ", ".join(f"{count} linears at {bits} bits" for bits, count in sorted(histogram.items()))
        loss = document["predicted_loss"]
        print(f"{document['bpw_linears']:.4f} stored bits per weight ({shares}), predicted KL {loss:.4f}: {output}")
