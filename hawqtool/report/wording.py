"""How an evaluation is put into words, the same at the terminal and in the card."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from hawqtool.allocation.roofline import names_hardware
from hawqtool.report.plan_comparison import Measured, PlanComparison, PlanQuality, Quality, TaskResult, UnroundedRival
from hawqtool.report.schema import Gate, Report, RowSet

MEASURES = {"kl": "KL (nats)", "embedding_error": "relative error"}
"""Heading of what a model is judged by."""

EXPLANATIONS = {
    "kl": "KL is that of the original's distribution to the quantized model's, in nats per output (per token for "
    "language models), with its standard error over rows.",
    "embedding_error": "The relative error is the squared change of the embedding (mean of the last hidden state over "
    "tokens, or those of an image and of a text together) over its square, with its standard error over rows.",
}

NOT_EVALUATED = "Not evaluated: nothing is known of the quality. `hawqtool evaluate` measures it against the original."

GATES = {
    "target_kl": "divergence on the selection rows, which choose",
    "max_kl": "divergence on the report rows",
    "max_kl_p99": "divergence that the worst hundredth of the outputs of the report rows reaches",
    "max_flips": "share of another likeliest token or class where the original is sure of its own",
    "max_task_drop": "points of accuracy lost on the task that lost most",
    "max_ppl_increase": "perplexity over that of the original, less one",
    "min_same_top": "share of outputs whose likeliest token or class is the original's",
    "max_size": "weight files",
    "max_fallbacks": "layers that needed a fallback",
    "max_kept": "share of the weights that stays as it is, embeddings and head aside",
    "regression_divergence": "divergence on the report rows, baseline and what it may rise",
    "regression_perplexity": "perplexity on the report rows, baseline and what it may rise",
    "regression_size": "weight files, baseline and what they may grow",
}
"""What the value of a gate is."""

_SHARES = ("max_ppl_increase", "min_same_top", "max_kept", "max_flips", "max_task_drop")
_BYTES = ("max_size", "regression_size")
_CHOOSING = ("measure", "compare plans", "width swap")
"""Stages that a run with a given plan has not."""


def gate_values(gate: Gate) -> tuple[str, str]:
    """Limit and found value of a gate for people, with as many digits as tell them apart."""
    limit, found = gate["limit"], gate["found"]
    if gate["name"] in _BYTES:
        return f"{limit:,.0f} bytes", f"{found:,.0f} bytes"
    factor, unit = (100, " %") if gate["name"] in _SHARES else (1, "")
    for digits in range(4, 18):
        shown = tuple(f"{factor * value:.{digits}g}{unit}" for value in (limit, found))
        if found == limit or shown[0] != shown[1]:
            break
    return shown[0], shown[1]


def gate_found(gate: Gate) -> str:
    """Limit and finding of a gate in one line, such as ``max_kl at most 0.1, found 0.0312``."""
    limit, found = gate_values(gate)
    return f"{gate['name']} {gate['sense']} {limit}, found {found}"


def gate_text(gate: Gate) -> str:
    """A gate and its verdict, such as ``max_kl at most 0.1, found 0.0312: passed``."""
    return f"{gate_found(gate)}: {'passed' if gate['passed'] else 'FAILED'}"


def not_rounded_lines(evaluation: PlanComparison) -> list[str]:
    """One line for each rival that was not carried out."""
    return [
        _rival_line(name, rival, evaluation["measure"]) for name, rival in evaluation.get("not_rounded", {}).items()
    ]


def _rival_line(name: str, rival: UnroundedRival, measure: str) -> str:
    less, text = rival.get("minus_shipped"), f"{name} ({rival['bpw_linears']:.3f} bits)"
    if less is None:
        return (
            f"{text} is predicted to lose {rival['ratio']:.1f} times as much as the mixed plan; predicted, not "
            "measured (--proof full measures it)"
        )
    error = "" if math.isnan(less["stderr"]) else f" ± {less['stderr']:.4f}"
    return (
        f"{text} less the shipped plan: {less['difference']:+.4f}{error} {MEASURES[measure]} on the selection rows, "
        "layers of both rounded one by one (--proof full carries it out)"
    )


def no_uniform_text(evaluation: PlanComparison) -> str:
    """Why there is no uniform plan to compare with."""
    if any(name.startswith("uniform") for name in evaluation.get("not_rounded", {})):
        return "No uniform plan was carried out to compare with."
    return "No uniform plan fits the budget, so there is none to compare with."


def same_plan(first: PlanQuality | None, second: PlanQuality | None) -> bool:
    """Whether two records are of one plan, where one of them at least is of a uniform plan."""
    if first is None or second is None:
        return False
    return first["stored_bytes"] == second["stored_bytes"] and first["formats"] == second["formats"]


def tried_plans(report: Report) -> list[dict[str, Any]]:
    """Every plan of the report that was rounded and evaluated at its budget, mixed ones first.

    Returns:
        Records of ``{mark, name, kind, record, shipped}``: the mark is short (a number, or the formats of a uniform
        plan), the kind ``mixed`` or ``uniform``.
    """
    evaluation, shipped = report["evaluation"], report["shipped"]
    if evaluation is None:
        return []
    uniform = evaluation["uniform"]
    found: list[dict[str, Any]] = []
    for name, record in evaluation["tried"].items():
        if not same_plan(record, uniform):
            chosen = shipped == "mixed" and name == evaluation["mixed"]["chosen_by"]
            plan = {"mark": str(len(found) + 1), "name": name, "kind": "mixed", "record": record, "shipped": chosen}
            found.append(plan)
    if uniform is not None:
        mark, chosen = " ".join(uniform["formats"]), same_plan(uniform, evaluation[shipped])
        found.append({"mark": mark, "name": f"uniform {mark}", "kind": "uniform", "record": uniform, "shipped": chosen})
    return found


def shown_metric(report: Report) -> str | None:
    """Metric whose predictions are shown: that of the shipped plan, else the run's; None where there are none."""
    evaluation = report["evaluation"]
    if evaluation is None:
        return report["metric"]
    predicted = evaluation["mixed"]["predicted"]
    return next((name for name in (report["metric"], *evaluation["tried"]) if name in predicted), None)


def measurement_text(report: Report) -> str | None:
    """Where the scores come from, unless the run measured them itself or needed none."""
    origin = report.get("measurement")
    if origin is None or origin["source"] == "run":
        return None
    if origin["source"] == "file":
        return "scores from a saved measurement"
    return f"scores from a shared measurement, fingerprint {str(origin['fingerprint'])[:12]}"


def shown_plan(name: str) -> str:
    """Name of a plan for the screen: the one choice of a run is just the plan, others say that they are one."""
    if name == "uniform menu":
        return "the plan"
    if name in ("original", "quantized"):
        return f"the {name} model"
    return name if name.startswith(("plan", "uniform")) else f"plan {name}"


def duration(seconds: float) -> str:
    """Time for people, with no more digits than an estimate bears: ``40 s``, ``5 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """Bytes for people, exact below a kilobyte."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def quality_columns(evaluation: Measured) -> dict[str, Callable[[Quality], str]]:
    """Heading and content of the columns that this kind of model has.

    Args:
        evaluation: Has ``measure`` and the record ``original``.
    """
    measure = evaluation["measure"]
    columns: dict[str, tuple[str, Callable[[Quality], str]]] = {
        "perplexity": ("perplexity", lambda values: f"{values.get('perplexity', math.inf):.2f}"),
        MEASURES[measure]: (measure, lambda values: f"{values[measure]:.4f}{plus_minus(values, measure)}"),
        "same top-1": ("same_top", lambda values: f"{100 * values['same_top']:.1f} %"),
        "cosine": ("cosine", lambda values: f"{values['cosine']:.4f}"),
    }
    return {name: show for name, (key, show) in columns.items() if key in evaluation["original"]}


def plus_minus(values: Mapping[str, object], measure: str) -> str:
    """Standard error of a measure, empty where it is not known."""
    stderr = values.get(f"{measure}_stderr")
    return "" if not isinstance(stderr, float) or math.isnan(stderr) else f" ± {stderr:.4f}"


def tail_text(values: Quality) -> str | None:
    """The worst outputs in words; None for a model without logits."""
    if "kl_p99" not in values:
        return None
    worst = f"1 output in 100 has a KL of {values['kl_p99']:.3g} or more, 1 in 1000 {values['kl_p999']:.3g}"
    if "flips" not in values:
        return worst
    return f"{worst}; {100 * values['flips']:.2f} % of the outputs that the original is sure of changed"


def task_lines(results: Sequence[TaskResult]) -> list[str]:
    """Accuracy on every task, original and quantized beside each other."""
    return [
        f"{result['name']}: {100 * result['original']:.1f} % -> {100 * result['quantized']:.1f} %, "
        f"{100 * result['difference']:+.1f} ± {100 * result['difference_stderr']:.1f} points on "
        f"{result['questions']} questions, {100 * result['same']:.1f} % answered alike"
        for result in results
    ]


def rows_text(record: RowSet) -> str:
    """Number and shape of rows, such as ``16 rows of 256 tokens``."""
    kind, shape = record["kind"], record["shape"]
    sizes = f" of {' x '.join(map(str, shape))}" if kind == "images" else ""
    return f"{record['count']} {rows_name(kind, shape[0])}{sizes}"


def rows_name(kind: str, positions: int) -> str:
    """Rows of a kind, such as ``rows of 256 tokens`` or ``sounds with 64 tokens``."""
    if kind == "tokens":
        return f"rows of {positions} tokens"
    return kind.replace("with tokens", f"with {positions} tokens")


def starred(name: str) -> str:
    """A name with each index replaced by a star: ``model.layers.*.mlp.experts.*.w1``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def role(name: str) -> str:
    """What follows the index of the block: ``self_attn.q_proj``, ``mlp.experts.*.w1``."""
    pattern = starred(name)
    return pattern.partition("*.")[2] or pattern


def routing_text(experts: Mapping[str, Sequence[int]]) -> str | None:
    """Least, median and most calibration tokens per expert; None for a dense model.

    Args:
        experts: Tokens of every expert, by block, as in report.json.
    """
    counts = [count for tokens in experts.values() for count in tokens]
    if not counts:
        return None
    blocks = "block" if len(experts) == 1 else "blocks"
    return (
        f"{len(counts)} experts in {len(experts)} {blocks}; calibration tokens per expert: min {min(counts)}, "
        f"median {median(counts):.0f}, max {max(counts)}"
    )


def loads_text(entry: Mapping[str, Any]) -> str:
    """Whether an engine loads a folder: yes, no, or not tried."""
    return "not tried" if entry["loads"] is None else "yes" if entry["loads"] else "no"


def cache_text(report: Report) -> str | None:
    """What the FP8 KV cache takes and costs; None where the cache stays in 16 bits."""
    cache = report.get("kv_cache")
    if cache is None:
        return None
    return (
        f"{cache['format']}, {cache['bytes_per_token']:,} bytes a token instead of "
        f"{cache['bytes_per_token_16_bit']:,}; by itself it costs the original KL {cache['kl']:.1e}, and all figures "
        "of the quantized model are with it"
    )


def cost_text(report: Report) -> str | None:
    """What the plan costs beside its bytes, of what was allowed; None where there is no second budget."""
    cost, most, config = report.get("cost"), report.get("max_cost"), report["config"]
    if cost is None or most is None:
        return None
    if config.get("max_active"):
        return f"{cost:,.0f} of {most:,.0f} bytes of quantized weights that a token reads"
    if names_hardware(config.get("costs")):
        return f"{cost:.4g} of {most:.4g} microseconds of a step by the roofline of {config['costs']}"
    return f"{cost:.6g} of {most:.6g}, by {config['costs']}"


def effort_text(report: Report) -> str | None:
    """What choosing the plan took, where there was one to choose and this run rounded it.

    It is measuring, comparing, swaps, and every rounding but the first. Evaluating the other plans is not told apart,
    so that a run with the plan given takes less. Of a run that was gone on with a part of each is missing.
    """
    timings = report["timings"]
    rounds = [seconds for stage, seconds in timings.items() if stage.startswith("round ")]
    chosen = sum(rounds[1:]) + sum(timings.get(stage, 0.0) for stage in _CHOOSING)
    if not rounds or not chosen or report.get("starts", 1) > 1:
        return None
    total = sum(timings.values())
    choosing, whole, given, once = map(_seconds, (chosen, total, total - chosen, rounds[0]))
    said = f"choosing the plan took {choosing} of {whole}; with it given a run takes at most {given}"
    return f"{said}, of which rounding is {once}"


def _seconds(value: float) -> str:
    return f"{value:.{int(value < 10)}f} s"
