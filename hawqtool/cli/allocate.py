"""``hawqtool allocate``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.render_scores import print_plan
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.config import load_config
from hawqtool.errors import UsageError
from hawqtool.report.documents import PlanDocument


@o.with_settings
def allocate(
    sensitivity_file: Annotated[Path, typer.Argument(metavar="SENSITIVITY", help="A sensitivity.json.")],
    values: o.Values,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "plan.json",
    sensitivity: Annotated[
        Optional[str], o.narrowed("sensitivity", "auto, fisher, kron, projection, hawq-ggn, hawq or kl.")
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option("--frontier", metavar="FILE", help="Write every budget's prediction (.csv or .json), no plan."),
    ] = None,
    frontier_points: Annotated[
        int | None,
        typer.Option(
            "--frontier-points", min=2, show_default=False, help=o.escaped("Points [default: all in CSV, 200 in JSON].")
        ),
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Choose the bits of every unit under a budget from a saved measurement; write plan.json.

    Group size, and widths where the usual ones were not measured, are by default those of the file.

    Example: hawqtool allocate sensitivity.json --target-bpw 3.5 -o plan.json

    Example: hawqtool allocate sensitivity.json --frontier frontier.csv
    """
    with session(debug=debug, json=json) as terminal:
        decide_hub_access()
        settings = load_config(None, values | {"model": str(sensitivity_file), "sensitivity": sensitivity})

        from hawqtool.pipeline.allocate import run_allocate, run_frontier

        if frontier is None and frontier_points is not None:
            raise UsageError("--frontier-points needs --frontier FILE; add it or drop the points")
        if frontier is None:
            plan = run_allocate(settings, sensitivity_file, Path(output), terminal)
            text = _plan_text(plan, output)
        else:
            curve = run_frontier(settings, sensitivity_file, frontier, frontier_points)
            text = f"{len(curve['points'])} points in {frontier}"
        if json:
            print_json(plan if frontier is None else curve)
        else:
            if frontier is None:
                print_plan(plan)
            print(text)


def _plan_text(document: PlanDocument, output: str) -> str:
    """The plan in a line, and how it was found in another."""
    histogram = Counter(entry["bits"] for entry in document["layers"])
    shares = ", ".join(f"{count} linears at {bits} bits" for bits, count in sorted(histogram.items()))
    found = f"{document['solver']}, {document['seconds']:.2f} s"
    if document["gap"] is not None:
        found += f", at most {100 * document['gap']:.2g} % above the optimum"
    if document["max_cost"] is not None:
        found += f"; second cost {document['cost']:g} of {document['max_cost']:g}"
    return (
        f"{document['bpw_linears']:.4f} stored bits per weight ({shares}), predicted KL "
        f"{document['predicted_loss']:.3g}: {output}\nsolver {found}"
    )
