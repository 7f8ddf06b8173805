"""Grades by limits, the worst of all measures, and what is said of them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

import pytest

from hawqtool.report.plan_comparison import Quality
from hawqtool.report.verdict import LIMITS, advice_text, next_bound, verdict, verdict_text

DOCUMENTED = Path(__file__).resolve().parents[3] / "docs/evaluation.md"
ORIGINAL = cast(Quality, {"num_tokens": 8192, "perplexity": 20.0, "kl": 0.0, "same_top": 1.0})


def quality(**values: Any) -> Quality:
    base = {"num_tokens": 8192, "perplexity": 20.0, "kl": 0.01, "same_top": 0.97}
    return cast(Quality, base | values)


@pytest.mark.parametrize(
    ("values", "grade"),
    [
        ({}, "near lossless"),
        ({"kl": 0.03, "same_top": 0.919, "perplexity": 20.5}, "usable"),
        # As published for 2 bits, and the run after which the screen once said nothing but "verified".
        ({"kl": 0.33, "same_top": 0.711, "perplexity": 30.0}, "damaged"),
        ({"same_top": 0.63}, "damaged"),
        # One bad measure is enough.
        ({"perplexity": 24.0}, "damaged"),
        ({"kl": 0.16}, "damaged"),
        ({"kl": math.nan}, "damaged"),
    ],
)
def test_the_worst_measure_decides(values: dict[str, float], grade: str) -> None:
    found = verdict(ORIGINAL, quality(**values), 32)
    assert found["grade"] == grade and verdict_text(found).startswith(grade) and not found["few_rows"]
    assert (advice_text(found) is None) == (grade == "near lossless")


def test_what_is_in_the_way_lowers_the_bound() -> None:
    found = verdict(ORIGINAL, quality(kl=0.14, same_top=0.78, perplexity=21.0), 32)
    aim = next_bound(found)
    assert found["grade"] == "damaged" and aim is not None
    assert aim[0] == "usable" and aim[1] == pytest.approx(0.14 * (0.20 / 0.22) ** 2)
    aim = next_bound(verdict(ORIGINAL, quality(kl=0.3, same_top=0.85, perplexity=21.0), 32))
    assert aim == ("usable", 0.15)


def test_embeddings_are_graded_by_their_error() -> None:
    original, good = ({"num_tokens": 320, "embedding_error": e, "cosine": 1.0} for e in (0.0, 0.009))
    found = verdict(cast(Quality, original), cast(Quality, good), 32)
    assert found["grade"] == "near lossless" and not found["few_rows"]


@pytest.mark.parametrize(("rows", "tokens", "few"), [(7, 100_000, True), (32, 4095, True), (8, 4096, False)])
def test_few_rows_are_said(rows: int, tokens: int, few: bool) -> None:
    assert verdict(ORIGINAL, quality(num_tokens=tokens), rows)["few_rows"] is few


def test_the_documented_limits_are_those_of_the_program() -> None:
    table = re.findall(r"^\| ([^|]+) \| ([\d.]+) (%?) ?\| ([\d.]+) %? ?\|$", DOCUMENTED.read_text(), re.MULTILINE)
    shown = {
        name: tuple(float(value) / (100 if unit else 1) for value in (near, usable))
        for name, near, unit, usable in table
    }
    assert shown == {
        "KL, nats per output": LIMITS["kl"],
        "likeliest outputs that changed": LIMITS["changed_top"],
        "rise of the perplexity": LIMITS["perplexity_rise"],
        "squared error of the embedding": LIMITS["embedding_error"],
    }


def test_the_size_that_is_advised_reaches_the_plan() -> None:
    found = verdict(ORIGINAL, quality(kl=0.3), 32)
    found |= {"good": {"grade": "usable", "bpw_linears": 3.9301, "bytes": 67_504}}
    assert advice_text(found) == (
        "usable is expected at 3.94 bits per weight, 67.5 kB (--target-bpw 3.94), as the scores predict"
    )
    assert "67.5 kB (--target-size 67504), as" in str(advice_text(found, by_size=True))
