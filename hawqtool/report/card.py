"""The model card of a quantized checkpoint: ``README.md`` of the output folder."""

from __future__ import annotations

from collections import Counter, defaultdict

from hawqtool.formats import UNQUANTIZED
from hawqtool.report.escape import code, escape, fenced, table
from hawqtool.report.front_matter import SourceFacts, Value, merged, read_source
from hawqtool.report.plan_comparison import shipped_of
from hawqtool.report.schema import Engine, PlanEntry, Report, Search
from hawqtool.report.verdict import verdict_text
from hawqtool.report.wording import (
    EXPLANATIONS,
    GATES,
    MEASURES,
    NOT_EVALUATED,
    cache_text,
    cost_text,
    gate_values,
    loads_text,
    measurement_text,
    no_uniform_text,
    not_rounded_lines,
    plus_minus,
    quality_columns,
    routing_text,
    rows_text,
    same_plan,
    tail_text,
    task_lines,
)

_INSTALL = "pip install torch transformers compressed-tensors"

_ONE_FORMAT = "every layer had one format to take, so no sensitivity was measured"

_LOAD = """\
from transformers import {model_class}, {input_class}

model = {model_class}.from_pretrained("path/to/this/folder")
{inputs} = {input_class}.from_pretrained("path/to/this/folder")"""


def model_card(report: Report, source_readme: str | None) -> str:
    """Text of the card.

    Names, licences and whatever else comes from a checkpoint are shown as they are, never as markup.

    Args:
        report: Of schema ``hawqtool.report/2``.
        source_readme: Text of the source's ``README.md``, None if it has none. Its front matter is merged, its
            body is not repeated.
    """
    facts = read_source(source_readme)
    sections = [
        _title(report),
        _licence(facts),
        _method(report),
        _plan(report),
        _kept(report),
        _sizes(report),
        _evaluation(report),
        _loading(report),
        _reproduction(report),
        _limits(report),
    ]
    return merged(facts, _base_model(report, facts), report["architecture"]) + "\n" + "\n\n".join(sections) + "\n"


def _base_model(report: Report, facts: SourceFacts) -> Value:
    """What the user says, the hub id, else what the source says it was made from, else the source's name."""
    if report["config"].get("base_model"):
        return str(report["config"]["base_model"])
    if report["model_revision"]:
        return str(report["model"])
    return facts.values.get("base_model") or str(report["model"])


def _title(report: Report) -> str:
    name, bits = escape(report["model"]), report["sizes"]["bpw_linears"]
    kind = "one format" if len(_formats(report)) == 1 else "mixed precision"
    return (
        f"# {name}, {bits:.2f} bits per weight\n\n"
        f"{name} with the weights of its linear layers in {kind}, made by hawqtool "
        f"{escape(report['hawqtool_version'])}: {bits:.4f} stored bits per weight over these layers, scales included. "
        f"{_rest(report)}."
    )


def _rest(report: Report) -> str:
    """What became of all but the linear layers."""
    if report["config"].get("embedding_bits") == 8:
        rest = "The embedding takes 8 bits. Everything else (norms, what the tables below do not list) "
    else:
        rest = "Everything else (embeddings, output head, norms, what the tables below do not list) "
    return rest + _as_it_was(report)


def _as_it_was(report: Report) -> str:
    found = report.get("rotation")
    if found is None:
        return "is as in the original"
    return (
        "is as in the original but for a rotation of the residual stream, which changes no output before weights are "
        f"rounded to 16 bits (after that: KL {found['kl']:.1e})"
    )


def _licence(facts: SourceFacts) -> str:
    values = facts.values
    stated = [
        f"{label} {_words(values[key])}"
        for key, label in (("license", "licence"), ("license_name", "name"), ("license_link", "text at"))
        if key in values
    ]
    if stated:
        text = f"As the source's card states: {', '.join(stated)}. The terms of the original model apply."
    else:
        text = (
            "**The source's card states no licence**, and none is claimed here; look for the terms of the original "
            "model before you use or pass on this one."
        )
    note = f"\n\n{escape(facts.note)}" if facts.note else ""
    return f"## Licence\n\n{text}{note}"


def _words(value: Value) -> str:
    return ", ".join(code(item) for item in ([value] if isinstance(value, str) else value))


def _formats(report: Report) -> list[str]:
    return sorted({_format(entry) for entry in report["plan"]})


def _format(entry: PlanEntry) -> str:
    if "format" in entry:
        return f"`{entry['format']}`"
    size = entry["group_size"]
    return f"{entry['bits']} bit, " + ("one scale per row" if size == "channel" else f"groups of {size}")


def _method(report: Report) -> str:
    config, rows = report["config"], report["rows"]
    calibration = rows["calibration"]
    how, given = "each weight to the nearest code, by itself", "none: no data was read"
    if calibration is not None:
        how = "block by block, each block on the inputs that the rounded blocks before it give"
        given = f"{rows_text(calibration)} ({_origin(calibration['source'])}), seed {config['seed']}"
    lines = [
        f"rounding: {code(config['rounding'])}, {how}",
        f"bits: {_choice(report)}",
        f"calibration: {given}",
        f"grid: {_grid(report)}",
    ]
    if config.get("embedding_bits") == 8:
        lines.append("embedding: 8 bits, with a scale for every row; a head that is tied to it shares the codes")
    lines += [f"rotation: {escape(text)}" for text in (report.get("rotation_choice"),) if text]
    lines += [f"KV cache: {text}" for text in (cache_text(report),) if text]
    lines += [f"Second budget: {text}" for text in (cost_text(report),) if text]
    lines += [f"sensitivity: {text}" for text in (measurement_text(report),) if text]
    routing = routing_text(report["experts"])
    if routing:
        lines.append(f"routing: {routing}")
    if report.get("refinement"):
        lines.append(_refinement(report))
    if report.get("distillation"):
        lines.append(_distillation(report))
    return "## Method\n\n" + "\n".join(f"- {line}" for line in lines)


def _grid(report: Report) -> str:
    special = sorted({entry["format"] for entry in report["plan"] if "format" in entry} - {UNQUANTIZED})
    plain = "symmetric integers, compressed-tensors format `pack-quantized`"
    return plain if not special else f"{', '.join(map(code, special))} of compressed-tensors; all else {plain}"


def _refinement(report: Report) -> str:
    blocks = report["refinement"].values()
    before, after = (sum(b[key] for b in blocks) / len(blocks) for key in ("error_before", "error_after"))
    return (
        f"refinement: at most {report['config']['refine_steps']} steps per block on rounding, scales and norm gains; "
        f"the mean relative error of the blocks' outputs on held-out rows fell from {before:.4g} to {after:.4g}"
    )


def _distillation(report: Report) -> str:
    found = report["distillation"]
    what = "codes, scales and norm gains" if report["config"].get("distill_codes") else "scales and norm gains"
    return (
        f"distillation: {found['steps']} steps on the {what} of the whole model; its divergence from "
        f"the original on held-out calibration rows fell from {found['error_before']:.4g} to {found['error_after']:.4g}"
    )


def _choice(report: Report) -> str:
    if report["config"].get("plan"):
        return f"as given by the plan {code(report['config']['plan'])}"
    evaluation = report["evaluation"]
    if evaluation is None:
        if report["metric"] is None:
            return _ONE_FORMAT
        return (
            f"chosen per layer by the sensitivity metric {code(report['metric'])} under a budget of stored bytes; the "
            "plan was not compared with others"
        )
    tried = list(evaluation["tried"])
    if tried == ["uniform menu"]:
        return _ONE_FORMAT
    best = evaluation["mixed"]["chosen_by"]
    by = f" by the sensitivity metric {code(best)}" if best == tried[0] else ""
    how = f"chosen per layer{by} under a budget of stored bytes"
    if report["search"] is not None:
        how = _searched(report["search"], tried[0])
    elif len(tried) > 1:
        how += f"; of {_enumerated(tried)}, {code(best)} diverged least on the selection rows"
    if report["shipped"] == "mixed" or same_plan(evaluation["mixed"], evaluation["uniform"]):
        return how
    if report["search"] is not None:
        return f"uniform, which meets the bound and is no larger than the mixed plan, {how}"
    return (
        "the best uniform plan within the budget, because the mixed one was not better for sure on the selection "
        f"rows; that one was {how}"
    )


def _searched(search: Search, metric: str) -> str:
    count = len(search["trials"])
    plans = "1 plan that was" if count == 1 else f"{count} plans that were"
    bound = f"a divergence of at most {search['bound']:g} on the selection rows"
    found = f"the smallest with {bound}" if search["met"] else f"the best one, as none has {bound}"
    return f"chosen per layer by the sensitivity metric {code(metric)}: of {plans} rounded and measured, {found}"


def _enumerated(tried: list[str]) -> str:
    """The plans of a short list; rounds of swaps are counted."""
    rounds = [name for name in tried if name.startswith("width swap ")]
    names = [code(name) for name in tried if name not in rounds]
    if rounds:
        names.append(f"{len(rounds)} that swaps of widths gave" if rounds[1:] else "one that swaps gave")
    return f"the plans {', '.join(names[:-1])} and {names[-1]}"


def _plan(report: Report) -> str:
    formats = _formats(report)
    roles: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in report["plan"]:
        roles[entry["name"].rpartition(".")[2]][_format(entry)] += 1
    rows = [[code(role), *(str(counts[fmt] or "") for fmt in formats)] for role, counts in roles.items()]
    return f"## Plan\n\nLayers of each role by format:\n\n{table(['role', *formats], rows)}"


def _kept(report: Report) -> str:
    kept = report["kept"]
    if not kept["rows"]:
        return "## Kept\n\nNo matrix stays as it is."
    rows = [[row["reason"], str(row["count"]), f"{row['bytes']:,}", code(row["pattern"])] for row in kept["rows"]]
    heading = ["reason", "matrices", "bytes", "names"]
    return (
        f"## Kept\n\nMatrices that stay as they are; beside embeddings and head {100 * kept['share']:.1f} % of the "
        f"weights:\n\n{table(heading, rows, numbers=False)}"
    )


def _sizes(report: Report) -> str:
    sizes = report["sizes"]
    before, after = sizes["original_bytes"], sizes["quantized_bytes"]
    rows = [
        ["original weight files", f"{before:,} bytes"],
        ["quantized weight files", f"{after:,} bytes ({100 * after / before:.1f} %)"],
        ["stored bits per weight, quantized linears", f"{sizes['bpw_linears']:.4f}"],
        ["stored bits per weight, whole files", f"{sizes['bpw_file']:.4f}"],
    ]
    if "effective_bits" in sizes and any("format" in entry for entry in report["plan"]):
        rows.append(["effective bits of the linears, as ModelOpt counts them", f"{sizes['effective_bits']:.4f}"])
    return f"## Size\n\n{table(['', 'value'], rows)}"


def _evaluation(report: Report) -> str:
    evaluation, source = report["evaluation"], report["rows"]["report"]
    if evaluation is None or source is None:
        return f"## Quality\n\n{NOT_EVALUATED}"
    uniform, mixed, measure = evaluation["uniform"], evaluation["mixed"], evaluation["measure"]
    shown = {report["shipped"]: mixed} if same_plan(mixed, uniform) else {"uniform": uniform, "mixed": mixed}
    columns = quality_columns(evaluation)
    rows = [["original", *(show(evaluation["original"]) for show in columns.values())]]
    for name, values in shown.items():
        if values is not None:
            label = f"{name} ({', '.join(values['formats'])})"
            label += ", shipped" if report["shipped"] == name else ""
            rows.append([label, *(show(values) for show in columns.values())])
    domain = (
        " These rows come from the calibration source (**in-domain**): they flatter the quantized model."
        if report["rows"]["report_in_domain"]
        else ""
    )
    found = report.get("verdict")
    lines = (
        [] if found is None else [f"Verdict: **{found['grade']}**" + f" ({verdict_text(found).partition(': ')[2]})."]
    )
    lines += [
        f"Measured from the written files on {rows_text(source)} ({_origin(source['source'])}) that neither "
        f"calibrated nor chose anything.{domain} {EXPLANATIONS[measure]}",
        table(["model", *columns], rows),
    ]
    tail = tail_text(shipped_of(evaluation, report["shipped"]))
    lines += [f"Task {escape(text)}." for text in task_lines(report.get("tasks", []))]
    lines += [f"The tail of the shipped model: {tail}."] if tail else []
    difference = evaluation.get("mixed_minus_uniform")
    if difference and not same_plan(mixed, uniform):
        lines.append(
            f"Paired difference of {MEASURES[measure]}, mixed - uniform: {difference[measure]:+.4f}"
            f"{plus_minus(difference, measure)}."
        )
    lines += [
        f"Gate {code(gate['name'])}, {GATES[gate['name']]}: {found}, {gate['sense']} {limit} was asked for, "
        f"{'passed' if gate['passed'] else '**failed**'}."
        for gate in report["gates"]
        for limit, found in (gate_values(gate),)
    ]
    if uniform is None:
        lines.append(no_uniform_text(evaluation))
    lines += [f"{escape(text)}." for text in not_rounded_lines(evaluation)]
    return "## Quality\n\n" + "\n\n".join(lines)


def _origin(source: str) -> str:
    return "sampled from the model itself" if source == "self" else code(source)


def _how_known(entry: Engine) -> str:
    """Why an engine loads the folder or not; that nobody tried it is said once."""
    said = entry["tried"] or "not run" in entry["reason"]
    return entry["reason"] if said else f"by format, not tested here: {entry['reason']}"


def _loading(report: Report) -> str:
    rows = [["hawqtool", escape(report["hawqtool_version"]), "yes", "verified: every tensor was read back in this run"]]
    for entry in report["engines"]:
        rows.append(
            [
                escape(entry["engine"]),
                escape(entry["minimum_version"]),
                loads_text(entry),
                escape(_how_known(entry)),
            ]
        )
    heading = ["loads in", "version, at least", "loads", "how that is known"]
    gains = [
        f"- {escape(entry['engine'])}: {escape(entry['gain'])}"
        for entry in report["engines"]
        if entry["loads"] and "gain" in entry
    ]
    parts = ["## Load", fenced(_INSTALL, "sh"), fenced(_load_code(report["architecture"]), "python")]
    if _serves(report):
        parts.append(fenced("vllm serve path/to/this/folder", "sh"))
    parts.append(table(heading, rows, numbers=False))
    return "\n\n".join([*parts, *(["What it gains there:\n\n" + "\n".join(gains)] if gains else [])])


def _serves(report: Report) -> bool:
    """Whether vLLM is expected to serve it."""
    loads = any(entry["loads"] and entry["engine"].startswith("vLLM") for entry in report["engines"])
    return loads and report["architecture"].endswith("ForCausalLM")


def _load_code(architecture: str) -> str:
    if architecture.endswith("ForCausalLM") or not architecture.isidentifier():
        return _LOAD.format(model_class="AutoModelForCausalLM", input_class="AutoTokenizer", inputs="tokenizer")
    return _LOAD.format(model_class=architecture, input_class="AutoProcessor", inputs="processor")


def _reproduction(report: Report) -> str:
    return (
        f"## Reproduce\n\n{fenced(report['command'], 'sh')}\n\n"
        f"hawqtool {escape(report['hawqtool_version'])}, {escape(report['device'])}. The versions of all packages are "
        "in `reproduce/packages.json`, the resolved settings in `reproduce/config.yaml`, the plan in "
        "`reproduce/plan.json`, everything measured in `report.json`."
    )


def _limits(report: Report) -> str:
    lines = [f"warning: {escape(text)}" for text in report["warnings"]]
    lines += [
        "quality was measured on the rows above only; other tasks and languages may lose more",
        "calibration and evaluation each used one draw of rows; small differences are noise",
        "safety, bias and instruction following were not evaluated; what the original's card says of them may not hold",
    ]
    return "## Warnings and limits\n\n" + "\n".join(f"- {line}" for line in lines)
