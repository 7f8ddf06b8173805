"""Gates: limits that judge a result and change nothing about it."""

from __future__ import annotations

from hawqtool.report.schema import Gate

AT_MOST, AT_LEAST = "at most", "at least"


def judge(name: str, limit: float, found: float, sense: str = AT_MOST) -> Gate:
    """The record of a gate: ``{name, sense, limit, found, passed}``. What is found as NaN passes nothing."""
    passed = found >= limit if sense == AT_LEAST else found <= limit
    return {"name": name, "sense": sense, "limit": limit, "found": found, "passed": passed}


def judge_change(name: str, before: float, share: float, found: float) -> Gate:
    """The gate of a value that may rise by a share of what it was; the record has that as ``baseline`` too.

    Args:
        name: Of the gate.
        before: Value of the earlier run. Below zero, as a divergence is by the rounding errors of two models that
            agree, it may rise by the share of its size.
        share: 0.05 for 5 %.
        found: Value of this run.
    """
    return {**judge(name, before + share * abs(before), found), "baseline": before}
