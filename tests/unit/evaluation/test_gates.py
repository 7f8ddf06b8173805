"""Gates and the JUnit report of a run: what passes, what is said of it, and what a file of ours may hold."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from hawqtool.cli.junit import RunRecord, junit_text
from hawqtool.errors import InputError, QualityError
from hawqtool.evaluation.gates import AT_LEAST, judge, judge_change
from hawqtool.report.wording import GATES, gate_text, gate_values

NAN = float("nan")


def test_limits_are_included_and_nan_passes_nothing() -> None:
    assert judge("max_kl", 0.1, 0.1)["passed"] and not judge("max_kl", 0.1, 0.1000001)["passed"]
    assert judge("min_same_top", 0.9, 0.9, AT_LEAST)["passed"]
    assert not judge("min_same_top", 0.9, 0.8999, AT_LEAST)["passed"]
    assert not judge("max_kl", 0.1, NAN)["passed"] and not judge("min_same_top", 0.1, NAN, AT_LEAST)["passed"]
    assert not judge_change("regression_divergence", NAN, 0.05, 0.1)["passed"]


@pytest.mark.parametrize(
    ("before", "found", "passed"),
    [(0.2, 0.21, True), (0.2, 0.2101, False), (0.0, 0.0, True), (0.0, 1e-9, False), (-1e-8, -1e-8, True)],
)
def test_a_regression_is_relative_to_the_baseline(before: float, found: float, passed: bool) -> None:
    gate = judge_change("regression_divergence", before, 0.05, found)
    assert gate["passed"] == passed and gate["baseline"] == before


def test_a_gate_that_fails_never_shows_the_limit_as_found() -> None:
    gate = judge("max_kl", 0.1, 0.1 + 1e-12)
    assert not gate["passed"] and len(set(gate_values(gate))) == 2
    assert gate_text(judge("max_kl", 0.1, 0.03)) == "max_kl at most 0.1, found 0.03: passed"
    assert gate_text(judge("max_ppl_increase", 0.05, 0.0512)) == "max_ppl_increase at most 5 %, found 5.12 %: FAILED"
    assert gate_text(judge("min_same_top", 0.9, 0.95, AT_LEAST)) == "min_same_top at least 90 %, found 95 %: passed"
    assert gate_text(judge("max_size", 9_000_000, 9_000_001)).endswith("9,000,000 bytes, found 9,000,001 bytes: FAILED")


def parsed(record: RunRecord, error: BaseException | None) -> Any:
    return ElementTree.fromstring(junit_text(record, error, 1.5))


def test_a_test_case_for_the_run_and_one_per_gate() -> None:
    gates = [judge(name, 1.0, 2.0 if name == "max_kl" else 0.5) for name in GATES]
    suite = parsed(RunRecord("tiny", gates), QualityError("1 of 9 gates failed", ("max_kl",)))
    assert suite.tag == "testsuite"
    assert suite.attrib | {"time": ""} == {
        "name": "hawqtool quantize",
        "tests": str(1 + len(GATES)),
        "failures": "1",
        "errors": "0",
        "skipped": "0",
        "time": "",
    }
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {"quantize tiny": []} | {name: ["failure"] * (name == "max_kl") for name in GATES}


@pytest.mark.parametrize(
    ("error", "said"), [(InputError("bad \x1b[31m\x00<name>&\ud800\n::error::x"), "bad"), (KeyboardInterrupt(), "Key")]
)
def test_what_ends_a_run_is_an_error_in_text_that_xml_allows(error: BaseException, said: str) -> None:
    suite = parsed(RunRecord("a\x00<model>"), error)
    (case,) = suite
    (failure,) = case
    assert (suite.get("errors"), suite.get("failures"), failure.tag) == ("1", "0", "error")
    assert failure.get("message", "").startswith(said) and failure.get("type") == type(error).__name__
    assert "\x1b" not in failure.get("message", "")
