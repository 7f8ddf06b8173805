"""Tables for people."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hawqtool.parsing import printable
from hawqtool.report.documents import DryRun, EvaluationDocument
from hawqtool.report.plan_comparison import PlanComparison, Shipped, shipped_of
from hawqtool.report.schema import Gate, Kept, Report, Search
from hawqtool.report.verdict import FEW_ROWS_TEXT, advice_text, verdict_text
from hawqtool.report.wording import (
    MEASURES,
    NOT_EVALUATED,
    cache_text,
    cost_text,
    duration,
    effort_text,
    gate_text,
    measurement_text,
    not_rounded_lines,
    plus_minus,
    quality_columns,
    routing_text,
    same_plan,
    size,
    tail_text,
    task_lines,
)

_LABEL = 12
_ENDS = {
    ("embedding", "head"): "embeddings and head stay as they are",
    ("embedding",): "embeddings stay as they are",
    ("head",): "the head stays as it is",
}
"""What is said of embeddings and head by those of them that a run keeps."""

_KEPT_ROWS = 12
"""Most rows of what is kept on the first screen; the report has all."""
_ROOMY = 96
_SPARE_COLUMNS = ("file", "perplexity")
"""Columns that narrow terminals do without: sizes follow below the table, and KL says more than perplexity."""


def announcement(description: DryRun) -> list[str]:
    """The screen before the long part."""
    low, high = description["achievable_bpw"]
    reach = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
    budget = description["budget_bpw"]
    about = "" if description["expected_is_exact"] else "at most "
    kind = "" if description["symmetric"] else ", asymmetric"
    if description["uniform_bits"] is not None:
        aim = f"uniform {description['uniform_bits']} bits"
    elif description["uniform_format"] is not None:
        aim = f"uniform {description['uniform_format']}"
    elif description["target_kl"] is not None:
        aim = f"the smallest size with a measured divergence of at most {description['target_kl']:g}"
    else:
        aim = (
            "from the plan" if budget is None else f"{budget:.3f} stored bits per weight"
        ) + f"; best uniform that fits: {description['best_uniform'] or 'none'}"
    lines = [
        f"model       {description['model']}: {description['blocks']} blocks, {description['linears']} linears in "
        f"{description['units']} units, {description['quantized_weights']:,} weights to quantize",
        *_source_lines(description),
        f"widths      {', '.join(map(str, description['widths']))} bits{kind}; achievable {reach} "
        "stored bits per weight",
        *_menu_lines(description),
        f"budget      {aim}",
        f"size        {size(description['original_bytes'])} now, {about}{size(description['expected_bytes'])} "
        f"({description['expected_bytes']:,} bytes) afterwards",
        f"work        {description['rounding']} on {description['calibration']}, {description['device']}, "
        f"seed {description['seed']}",
        f"rotation    {description['rotation']}",
        *([f"KV cache    {description['kv_cache']}"] if description["kv_cache"] else []),
        f"judged on   {description['evaluation']}",
    ]
    lines += [*estimate_lines(description), *kept_lines(description["kept"])]
    return lines + [f"note        {text}" for text in description["group_falls"]]


def _menu_lines(description: DryRun) -> list[str]:
    """Group sizes by width, where there are several to choose from."""
    by_width: dict[str, list[str]] = {}
    for label in description["menu"]:
        plain = re.match(r"w\d", label) and "-" not in label
        by_width.setdefault(label[:2] if plain else label, []).append(label[2:] if plain else "")
    if max(map(len, by_width.values()), default=0) < 2 and not any(sizes == [""] for sizes in by_width.values()):
        return []
    shown = (f"{width} {' '.join(sizes)}".strip() for width, sizes in by_width.items())
    return [f"menu        {', '.join(shown)}"]


def estimate_lines(description: DryRun) -> list[str]:
    """What the run may take; nothing where that was not estimated."""
    found = description.get("estimate")
    if found is None:
        return []
    place = "GPU memory" if description["device"].startswith("cuda") else "memory"
    return [
        f"takes       about {duration(found['seconds'])}, {size(found['memory_bytes'])} of {place}, "
        f"{size(found['disk_bytes'])} of disk"
    ]


def _source_lines(description: DryRun) -> list[str]:
    """How a quantized original is stored, and what it left in 16 bits."""
    if description["source_format"] is None:
        return []
    left = description["left_unquantized"]
    lines = [f"source      {description['source_format']}, dequantized on reading; that model is the reference"]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        lines.append(f"kept        {left[0]}{more}, which the source left in 16 bits; --pin NAME=BITS quantizes them")
    return lines


def kept_lines(kept: Kept) -> list[str]:
    """What stays as it is: a total, and a line for each reason and pattern of names."""
    ends = tuple(reason for reason in ("embedding", "head") if any(row["reason"] == reason for row in kept["rows"]))
    others = f"{size(kept['bytes'])} ({100 * kept['share']:.1f} % of the weights)" if kept["bytes"] else ""
    total = _ENDS.get(ends, "") or ("" if others else "nothing but small tensors, such as norms")
    if others:
        total += f", and {others} beside them" if total else f"{others} stay as they are"
    rows = [
        f"            {row['reason']}: {row['count']} x {row['pattern']}, {size(row['bytes'])}"
        for row in kept["rows"][:_KEPT_ROWS]
    ]
    more = len(kept["rows"]) - _KEPT_ROWS
    return [f"kept        {total}", *rows, *([f"            and {more} more"] if more > 0 else [])]


def print_report(report: Report, output: str, seconds: float) -> None:
    """The result: sizes, histogram, quality against uniform."""
    console = Console(highlight=False)
    if report["evaluation"] is not None:
        console.print(_quality_table(report, report["evaluation"], console))
    for line in result_lines(report):
        console.print(hanging(printable(line), console.width), markup=False)
    for line in verdict_lines(report):
        console.print(hanging(printable(line), console.width), markup=False)
    for text in report["warnings"]:
        console.print(hanging(f"warning     {printable(text)}", console.width), markup=False)
    console.print(f"verified    {printable(output)}", markup=False)
    for line in closing_lines(report, output, seconds):
        console.print(hanging(printable(line), console.width), markup=False)


def closing_lines(report: Report, output: str, seconds: float) -> list[str]:
    """Ratio, time, where the report lies, and what to do next."""
    sizes, path = report["sizes"], shlex.quote(output)
    ratio = sizes["original_bytes"] / sizes["quantized_bytes"]
    loads = {entry["engine"] for entry in report["engines"] if entry["loads"]}
    served = next((name for name in loads if name.lower().startswith("vllm")), None)
    changed = f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times larger"
    if f"{ratio:.2f}" == "1.00":  # of an original in so few bits
        changed = "as large as the original"
    lines = [f"done        {changed}, in {duration(seconds)}; look at {Path(output) / 'report.html'}"]
    if served is not None and report["architecture"].endswith("ForCausalLM"):
        lines.append(f"next        vllm serve {path}")
    return [*lines, f"{'' if len(lines) > 1 else 'next':12}hawqtool push {path} ORG/NAME"]


def verdict_lines(report: Report) -> list[str]:
    """What the figures mean, and what would be better."""
    found = report.get("verdict")
    if found is None:
        return []
    notes = [
        advice_text(found, bool(report["config"].get("target_size"))),
        FEW_ROWS_TEXT if found["few_rows"] else None,
    ]
    return [f"verdict     {verdict_text(found)}", *(f"            {note}" for note in notes if note)]


def _quality_table(report: Report, evaluation: PlanComparison, console: Console) -> Table:
    """Original, uniform and mixed plan in the columns of their kind of model; narrow terminals get fewer columns."""
    columns, roomy = quality_columns(evaluation), console.width >= _ROOMY
    bits = "bits/weight" if roomy else "bits"
    original = {"model": "original", "file": size(report["sizes"]["original_bytes"])}
    rows = [original | {name: show(evaluation["original"]) for name, show in columns.items()}]
    alone = same_plan(evaluation["mixed"], evaluation["uniform"])
    for name, values in (("uniform", evaluation["uniform"]), ("mixed", evaluation["mixed"])):
        if values is None or (name == "mixed" and alone):
            continue
        row = {"model": name, "formats": " ".join(values["formats"]), bits: f"{values['bpw_linears']:.3f}"}
        row |= {"file": size(values["total_bytes"])}
        rows.append(row | {name: show(values) for name, show in columns.items()})
    names = ["model", *(["formats"] if roomy else []), bits, "file", *columns]
    for spare in _SPARE_COLUMNS:
        # A border and two spaces beside each column, and the last border.
        taken = sum(3 + max(len(text) for text in (name, *(row.get(name, "") for row in rows))) for name in names) + 1
        if not roomy and taken > console.width and spare in names:
            names.remove(spare)
    table = Table(title="quality on the report rows" + (" (in-domain)" if report["rows"]["report_in_domain"] else ""))
    for name in names:
        words = name in ("model", "formats")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table


def fitted(line: str, console: Console) -> str:
    """A labelled line, wrapped between words on a terminal; elsewhere it stays one line."""
    return hanging(line, console.width) if console.is_terminal else line


def hanging(line: str, width: int) -> str:
    """A line of a 12-character label and text, continued below the text where the terminal ends."""
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * _LABEL, break_on_hyphens=False)) or line


def result_lines(report: Report) -> list[str]:
    """What is said below the table: the plan, sizes, comparisons, gates, seconds."""
    evaluation, sizes = report["evaluation"], report["sizes"]
    histogram = Counter(entry.get("format") or f"{entry['bits']} bits" for entry in report["plan"])
    lines = [
        f"shipped     {report['shipped']}: "
        + ", ".join(f"{count} linear{'s' * (count > 1)} at {kind}" for kind, count in sorted(histogram.items())),
        f"size        {sizes['original_bytes']:,} -> {sizes['quantized_bytes']:,} bytes; {sizes['bpw_linears']:.3f} "
        f"stored bits per weight over the linears, {sizes['bpw_file']:.3f} over the whole file",
    ]
    lines += [f"sensitivity {text}" for text in (measurement_text(report),) if text]
    lines += [f"KV cache    {text}" for text in (cache_text(report),) if text]
    lines += [f"cost        {text}" for text in (cost_text(report),) if text]
    routing = routing_text(report["experts"])
    if routing:
        lines.append(f"routing     {routing}")
    if evaluation is None:
        lines.append("quality     " + NOT_EVALUATED.replace("`", ""))
    else:
        lines += _comparison_lines(evaluation, report["shipped"])
    lines += [f"task        {text}" for text in task_lines(report.get("tasks", []))]
    lines += [*search_lines(report["search"]), *gate_lines(report["gates"])]
    spent: dict[str, float] = {}
    for stage, seconds in report["timings"].items():
        group = "round" if stage.startswith("round ") else stage
        spent[group] = spent.get(group, 0.0) + seconds
    lines.append("time        " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in spent.items()))
    effort = effort_text(report)
    return lines if effort is None else [*lines, f"            {effort}"]


def _comparison_lines(evaluation: PlanComparison, shipped: Shipped) -> list[str]:
    """The mixed plan against the uniform one, and all that were tried."""
    lines, difference = list[str](), evaluation.get("mixed_minus_uniform")
    if difference and not same_plan(evaluation["mixed"], evaluation["uniform"]):
        measure = evaluation["measure"]
        value = f"{difference[measure]:+.4f}{plus_minus(difference, measure)}"
        lines.append(f"paired      {MEASURES[measure]}, mixed - uniform: {value}")
    tail = tail_text(shipped_of(evaluation, shipped))
    lines += [f"tail        {tail}"] if tail else []
    lines += [f"rival       {text}" for text in not_rounded_lines(evaluation)]
    return lines + tried_lines(evaluation)


def gate_lines(gates: list[Gate]) -> list[str]:
    """Limits and whether the shipped plan is within them."""
    return [f"gate        {gate_text(gate)}" for gate in gates]


def tried_lines(evaluation: PlanComparison) -> list[str]:
    """The mixed plans that were tried, selection rows; empty where there was one plan."""
    tried, measure = evaluation["tried"], evaluation["measure"]
    if len(tried) < 2:
        return []
    longest = max(map(len, tried))
    lines = []
    for name, values in tried.items():
        text = f"{name:{longest}}  {values['bpw_linears']:.3f} bits, {values['selection'][measure]:.4f}"
        difference = values["minus_uniform"].get("selection")
        if difference:
            text += f", {difference[measure]:+.4f}{plus_minus(difference, measure)} to uniform"
        lines.append(f"tried       {text}" + " (the best)" * (name == evaluation["mixed"]["chosen_by"]))
    return [*lines, f"            {MEASURES[measure]} on the selection rows, which choose"]


def search_lines(search: Search | None) -> list[str]:
    """What the search for a quality target measured, by size."""
    if search is None:
        return []
    return [
        f"searched    {entry['bpw_linears']:.3f} bits: "
        + ", ".join(f"{_to_compare(value)} on the {role} rows" for role, value in entry["divergence"].items())
        + (", misses" if entry["divergence"]["selection"] > search["bound"] else ", meets the target")
        for entry in sorted(search["trials"], key=lambda entry: entry["stored_bytes"])
    ]


def _to_compare(divergence: float) -> str:
    """With enough digits to see on which side of a small bound it lies."""
    return f"{divergence:.4f}" if divergence >= 0.01 else f"{divergence:.3g}"


def quality_lines(evaluation: EvaluationDocument) -> list[str]:
    """One line per measure of an evaluation of ``original`` and ``quantized``."""
    original, quantized = evaluation["original"], evaluation["quantized"]
    tail = tail_text(quantized)
    lines = [
        f"{name:15s} {show(quantized)}" + (f" (original {show(original)})" if name == "perplexity" else "")
        for name, show in quality_columns(evaluation).items()
    ]
    lines += [f"{'tail':15s} {tail}"] if tail else []
    return lines + [f"{'task':15s} {text}" for text in task_lines(evaluation.get("tasks", []))]
