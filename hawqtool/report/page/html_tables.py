"""The tables of ``report.html``."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hawqtool.report.escape import one_line
from hawqtool.report.plan_comparison import Divergence, Measure, PlanComparison, PlanQuality, Quality, SwapAttempt
from hawqtool.report.schema import Engine, Gate, Kept, Report, Search, layer_error, named_rows
from hawqtool.report.wording import (
    GATES,
    MEASURES,
    gate_values,
    loads_text,
    no_uniform_text,
    plus_minus,
    quality_columns,
    rows_text,
    same_plan,
    shown_metric,
    size,
    tried_plans,
)

_WORST = 5
_LONGEST = 500
_TWO_STDERR = 2


def quality_table(report: Report, evaluation: PlanComparison) -> str:
    """Original and plans in the columns of their kind of model; the shipped plan stands out."""
    shipped = evaluation[report["shipped"]]
    columns = quality_columns(evaluation)
    mixed, uniform = evaluation["mixed"], evaluation["uniform"]
    rows = [["original", "", "", size(report["sizes"]["original_bytes"])] + _shown(evaluation["original"], columns)]
    records = {"mixed": None if same_plan(mixed, uniform) else mixed, "uniform": uniform}
    chosen = None
    for name, record in records.items():
        if record is None:
            continue
        if record == shipped:
            chosen, name = len(rows), f"{name} (shipped)"
        cells = [name, " ".join(record["formats"]), f"{record['bpw_linears']:.3f}", size(record["total_bytes"])]
        rows.append(cells + _shown(record, columns))
    heading = ["plan", "formats", "bits/weight", "weight files", *columns]
    return _table(heading, rows, numbers=range(2, len(heading)), chosen=chosen)


def _shown(record: Quality, columns: Mapping[str, Callable[[Quality], str]]) -> list[str]:
    return [show(record) for show in columns.values()]


def verdict(evaluation: PlanComparison) -> str:
    """Whether mixing widths paid, by the paired difference to the best uniform plan that fits."""
    mixed, uniform, measure = evaluation["mixed"], evaluation["uniform"], evaluation["measure"]
    if uniform is None:
        return no_uniform_text(evaluation)
    if same_plan(mixed, uniform):
        return "The plan is uniform, so there is no mixed one to compare it with."
    difference = evaluation["mixed_minus_uniform"]
    value = difference[measure]
    stderr = difference.get("kl_stderr", difference.get("embedding_error_stderr"))
    text = f"Mixed minus uniform, paired: {value:+.4f}{plus_minus(difference, measure)} {MEASURES[measure]}; "
    # Written so that a standard error of NaN decides nothing.
    if stderr is None or not abs(value) > _TWO_STDERR * stderr:
        return text + "no difference beyond two standard errors."
    better, worse = ("mixed", "uniform") if value < 0 else ("uniform", "mixed")
    return text + f"the {better} plan is better than the {worse} one by more than two standard errors."


def tried_table(report: Report, measure: Measure) -> str:
    """Every plan that was tried: size, prediction, quality on both sets of rows, paired differences to uniform."""
    metric = shown_metric(report)
    plans, rows, chosen = tried_plans(report), list[list[str]](), None
    compared = [role for role in ("selection", "report") if any(_minus(plan["record"], role) for plan in plans)]
    for plan in plans:
        record = plan["record"]
        if plan["shipped"]:
            chosen = len(rows)
        predicted = record["predicted"].get(metric)
        rows.append(
            [
                plan["mark"] if plan["kind"] == "mixed" else "",
                plan["name"] + " (shipped)" * plan["shipped"],
                f"{record['bpw_linears']:.3f}",
                "" if predicted is None else f"{predicted:.4f}",
                *(_measured(values, measure) for values in (record.get("selection"), record)),
                *(_difference(_minus(record, role), measure) for role in compared),
            ]
        )
    name = MEASURES[measure]
    heading = ["", "plan", "bits/weight", f"predicted ({metric})" if metric else "predicted"]
    heading += [f"{name}, selection", f"{name}, report", *(f"minus uniform, {role}" for role in compared)]
    return _table(heading, rows, numbers=range(2, len(heading)), names=(1,), chosen=chosen)


def _measured(values: Mapping[str, Any] | None, measure: str) -> str:
    return "" if values is None else f"{values[measure]:.4f}{plus_minus(values, measure)}"


def _minus(record: PlanQuality, role: str) -> Divergence | None:
    """Paired difference of a mixed plan to uniform on a set of rows, None where there is none."""
    return record.get("minus_uniform", {}).get(role)


def _difference(values: Divergence | None, measure: Measure) -> str:
    return "" if values is None else f"{values[measure]:+.4f}{plus_minus(values, measure)}"


def swaps_table(attempts: Sequence[SwapAttempt]) -> str:
    """Plans that swaps by gradient tried: what might move, what did, predicted and measured change, what was taken."""
    rows = [
        [
            str(attempt["round"]),
            f"{100 * attempt['share']:.3g} %",
            str(attempt["moves"]),
            f"{attempt['predicted']:+.4f} ± {attempt['predicted_stderr']:.4f}",
            f"{attempt['measured']:+.4f} ± {attempt['measured_stderr']:.4f}",
            "taken" if attempt["accepted"] else "",
        ]
        for attempt in attempts
    ]
    heading = ["round", "bytes that might move", "units moved", "predicted change", "measured, selection", ""]
    return _table(heading, rows, numbers=range(len(heading) - 1))


def search_table(search: Search, measure: str) -> str:
    """The plans of a search for a quality target by size; the smallest that meets the bound stands out."""
    trials = sorted(search["trials"], key=lambda trial: trial["stored_bytes"])
    roles = list(trials[0]["divergence"])
    meets = [trial["divergence"]["selection"] <= search["bound"] for trial in trials]
    rows = [
        [f"{trial['stored_bytes']:,}", f"{trial['bpw_linears']:.3f}"]
        + [f"{trial['divergence'][role]:.4f}" for role in roles]
        + ["meets it" if met else "misses it"]
        for trial, met in zip(trials, meets, strict=True)
    ]
    heading = ["stored bytes", "bits/weight", *(f"{MEASURES[measure]}, {role}" for role in roles), "the bound"]
    chosen = meets.index(True) if any(meets) else None
    return _table(heading, rows, numbers=range(len(heading) - 1), chosen=chosen)


def gates_table(gates: Sequence[Gate]) -> str:
    """Limits, the values of the shipped plan, and whether it is within them."""
    rows = [
        [
            gate["name"],
            GATES[gate["name"]],
            f"{gate['sense']} {limit}",
            found,
            "passed" if gate["passed"] else "FAILED",
        ]
        for gate in gates
        for limit, found in (gate_values(gate),)
    ]
    return _table(["gate", "value of", "limit", "found", "result"], rows, numbers=(2, 3))


def formats_table(report: Report) -> str:
    """Layers and stored bytes of each format."""
    counts: dict[tuple[int, str, str], int] = defaultdict(int)
    stored: dict[tuple[int, str, str], int] = defaultdict(int)
    for entry in report["plan"]:
        groups = "one scale per row" if entry["group_size"] == "channel" else f"groups of {entry['group_size']}"
        grid = entry.get("format") or ("symmetric" if entry["symmetric"] else "with zero points")
        key = (entry["bits"], groups, grid)
        counts[key] += 1
        stored[key] += entry["bytes"]
    total = sum(stored.values())
    rows = [
        [str(key[0]), key[1], key[2], str(counts[key]), f"{stored[key]:,}", f"{100 * stored[key] / total:.1f} %"]
        for key in sorted(counts)
    ]
    return _table(["bits", "scales", "grid", "linears", "stored bytes", "share"], rows, numbers=(0, 3, 4, 5))


def kept_table(kept: Kept) -> str:
    """Matrices that stay as they are, by reason and pattern of their names."""
    if not kept["rows"]:
        return '<p class="note">No matrix stays as it is.</p>'
    rows = [
        [row["reason"], str(row["count"]), f"{row['bytes']:,}", row["pattern"], row["example"]] for row in kept["rows"]
    ]
    share = f"{size(kept['bytes'])} beside embeddings and head, {100 * kept['share']:.1f} % of the weights."
    table = _table(["why", "matrices", "bytes", "names", "first of them"], rows, numbers=(1, 2), names=(0,))
    return f'{table}\n<p class="note">{share}</p>'


def worst_table(report: Report) -> str:
    """The layers with the largest relative error of their outputs, beside plain rounding, or of their weights."""
    rows = []
    for name, values in sorted(report["layers"].items(), key=lambda item: (-layer_error(item[1]), item[0]))[:_WORST]:
        plain = "" if values["rtn_error"] is None else f"{values['rtn_error']:.3g}"
        rows.append([name, values["format"], f"{layer_error(values):.3g}", plain, values["fallback"] or ""])
    return _table(["layer", "format", "relative error", "plain rounding", "fallback"], rows, numbers=(2, 3))


def _gain(entry: Engine) -> str:
    return "" if entry["loads"] is False else entry.get("gain", "")


def engines_table(report: Report) -> str:
    """Which engines load the folder."""
    rows = [
        [entry["engine"], loads_text(entry), entry["minimum_version"], entry["reason"], _gain(entry)]
        for entry in report["engines"]
    ]
    return _table(["engine", "loads", "version, at least", "why", "what is gained"], rows, wide=(3, 4))


def rows_table(report: Report) -> str:
    """Sets of rows with their fingerprints."""
    rows = [
        [name, record["source"], rows_text(record), record["fingerprint"]]
        for name, record in named_rows(report).items()
    ]
    return _table(["set", "source", "rows", "fingerprint (SHA-256)"], rows, code=(3,))


def versions_table(versions: Mapping[str, Any]) -> str:
    """Versions of the packages."""
    if not versions:
        return '<p class="note">reproduce/packages.json was not found.</p>'
    return _table(["package", "version"], [[str(k), str(v)] for k, v in versions.items()])


def _table(
    heading: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
    wide: Collection[int] = (),
    code: Collection[int] = (),
    names: Collection[int] = (),
    chosen: int | None = None,
) -> str:
    """A table in a box of its own that scrolls; all cells are escaped here.

    Args:
        heading: Names of the columns.
        rows: Cells.
        numbers: Columns that go to the right.
        wide: Columns of long text.
        code: Columns in the font of code.
        names: Columns of names of several words.
        chosen: Row that stands out.
    """

    def cell(tag: str, column: int, content: str) -> str:
        classes = {"n": numbers, "text": wide, "name": names}
        kind = next((f' class="{name}"' for name, columns in classes.items() if column in columns), "")
        text = html.escape(one_line(content, _LONGEST))
        return f"<{tag}{kind}>{f'<code>{text}</code>' if column in code and tag == 'td' else text}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, name) for i, name in enumerate(heading)) + "</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="chosen"' if number == chosen else ""
        lines.append(f"<tr{mark}>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>")
    return '<div class="scroll" tabindex="0"><table>\n' + "\n".join(lines) + "\n</table></div>"
