"""Verdict on a result in words: near lossless, usable or damaged, by limits whose origin docs/evaluation.md states."""

from __future__ import annotations

import math
from typing import NamedTuple

from hawqtool.report.plan_comparison import Quality
from hawqtool.report.schema import Grade, Verdict
from hawqtool.report.wording import size

NEAR_LOSSLESS, USABLE, DAMAGED = GRADES = ("near lossless", "usable", "damaged")
FEW_ROWS, FEW_TOKENS = 8, 4096
"""Below either the figures are too uncertain to tell grades apart: the top-1 agreement of 4096 tokens has a standard
error of half a percent and more."""


class Limits(NamedTuple):
    """Most that a measure may be for the first two grades."""

    near_lossless: float
    usable: float


LIMITS = {
    "kl": Limits(0.02, 0.15),
    "changed_top": Limits(0.06, 0.20),
    "perplexity_rise": Limits(0.02, 0.15),
    "embedding_error": Limits(0.01, 0.10),
}
"""By measure: nats per output, share of outputs whose likeliest class changed, relative rise, relative squared error.

The first three are set between the rungs of llama.cpp's table of Llama 3 8B (tools/perplexity/README.md): near lossless
holds its 5 bits and more (KL 0.011; at 6 bits 96 % of the likeliest tokens are the same), usable its 4 and 3 bits (KL
0.03 and 0.10, 92 % at 4), damaged its 2 bits (KL 0.33 to 0.45, 71 %, perplexity half as much again). For embeddings no
such table is known; an error of 0.1 is a cosine of about 0.95.
"""


def verdict(original: Quality, quantized: Quality, rows: int) -> Verdict:
    """The worst grade of all measures that a result has, with each.

    Args:
        original: The original on the report rows.
        quantized: The result on them.
        rows: How many they are.
    """
    found = measures(original, quantized)
    grades = {name: grade_of(name, value) for name, value in found.items()}
    return {
        "grade": max(grades.values(), key=GRADES.index),
        "grades": dict(grades),
        "measures": found,
        "few_rows": rows < FEW_ROWS or quantized["num_tokens"] < FEW_TOKENS and "kl" in quantized,
        "good": None,
    }


def measures(original: Quality, quantized: Quality) -> dict[str, float]:
    """What a result is graded by, those that it has."""
    found: dict[str, float] = {}
    if "kl" in quantized:
        found["kl"] = quantized["kl"]
    if "same_top" in quantized:
        found["changed_top"] = 1 - quantized["same_top"]
    if "perplexity" in quantized and "perplexity" in original:
        found["perplexity_rise"] = quantized["perplexity"] / original["perplexity"] - 1
    if "embedding_error" in quantized:
        found["embedding_error"] = quantized["embedding_error"]
    return found


def grade_of(measure: str, value: float) -> Grade:
    """Grade of one measure; what is no number is damage."""
    limits = LIMITS[measure]
    if math.isnan(value) or value > limits.usable:
        return "damaged"
    return "near lossless" if value <= limits.near_lossless else "usable"


def next_bound(found: Verdict) -> tuple[Grade, float] | None:
    """The better grade to aim at, and the most divergence that lets all measures reach it; None for near lossless.

    Where another measure than the divergence is in the way, the share of changed outputs is taken to grow with the root
    of the divergence, and perplexity with the divergence itself.
    """
    if found["grade"] == NEAR_LOSSLESS:
        return None
    aim: Grade = "usable" if found["grade"] == DAMAGED else "near lossless"
    values = found["measures"]
    measure = "kl" if "kl" in values else "embedding_error"
    bound = _limit(measure, aim)
    for name, value in values.items():
        if name != measure and value > _limit(name, aim):
            power = 2 if name == "changed_top" else 1
            bound = min(bound, values[measure] * (_limit(name, aim) / value) ** power)
    return aim, bound


def _limit(measure: str, grade: Grade) -> float:
    limits = LIMITS[measure]
    return limits.usable if grade == USABLE else limits.near_lossless


def verdict_text(found: Verdict) -> str:
    """The verdict in a line: ``usable: KL 0.0801, 14.8 % of the likeliest tokens changed, perplexity +8.9 %``."""
    values = found["measures"]
    texts = {
        "kl": lambda value: f"KL {value:.4f}",
        "changed_top": lambda value: f"{100 * (1 - value):.1f} % of the likeliest outputs are the same",
        "perplexity_rise": lambda value: f"perplexity {100 * value:+.1f} %",
        "embedding_error": lambda value: f"relative error {value:.4f}",
    }
    worst = [name for name, grade in found["grades"].items() if grade == found["grade"]]
    said = [texts[name](value) for name, value in values.items() if name in worst or name in ("kl", "embedding_error")]
    return f"{found['grade']}: {', '.join(said)}"


def advice_text(found: Verdict, by_size: bool = False) -> str | None:
    """What size would do better, or how to find out; None for what is near lossless.

    Args:
        found: The verdict.
        by_size: Whether the run had a size of files for a target, under which other settings have other defaults.
    """
    aim = next_bound(found)
    if aim is None:
        return None
    good = found["good"]
    if good is None:
        return f"for the grade {aim[0]} use more bits (a wider --bits or a higher target), or --target-kl {aim[1]:.2g}"
    bpw = f"{math.ceil(100 * good['bpw_linears']) / 100:.2f}"
    target = f"--target-size {good['bytes']}" if by_size else f"--target-bpw {bpw}"
    return (
        f"{good['grade']} is expected at {bpw} bits per weight, {size(good['bytes'])} ({target}), as the scores predict"
    )


FEW_ROWS_TEXT = "judged on few rows, so this may be a grade off; --eval-samples and --seq-len give more"
