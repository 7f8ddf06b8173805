"""Paired differences over sources of rows against a slow reference: scipy's own tests."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy import stats

from hawqtool.evaluation.paired import compare_paired
from hawqtool.records import Evaluation


def evaluation(rows: list[float], sources: tuple[str, ...] = ()) -> Evaluation:
    return Evaluation("kl", statistics.mean(rows), 0.0, tuple(rows), 1, sources=sources)


def drawn(seed: int, count: int, mean: float) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, 1.0 + seed) for _ in range(count)]


def test_one_source_is_students_paired_test() -> None:
    first, second = drawn(0, 12, 1.0), drawn(1, 12, 1.5)
    found, wanted = compare_paired(evaluation(first), evaluation(second)), stats.ttest_rel(first, second)
    assert found.value / found.stderr == pytest.approx(wanted.statistic)
    assert found.freedom == pytest.approx(wanted.df)
    for tried in (1, 3):
        assert found.needed(tried) == pytest.approx(stats.t.ppf(1 - 0.05 / tried, 11))


def test_two_sources_are_welchs_test_of_their_means() -> None:
    """The mean of two means over its standard error is Welch's statistic of one sample against the other's negative."""
    one, other = drawn(2, 7, 1.0), drawn(3, 5, 2.0)
    rows, zeros, sources = [*one, *other], [0.0] * 12, ("a",) * 7 + ("b",) * 5
    found = compare_paired(evaluation(rows, sources), evaluation(zeros, sources))
    wanted = stats.ttest_ind(one, [-value for value in other], equal_var=False)
    assert found.value / found.stderr == pytest.approx(wanted.statistic)
    assert found.freedom == pytest.approx(wanted.df)
    assert found.value == pytest.approx((statistics.mean(one) + statistics.mean(other)) / 2)
    assert found.by_source["b"] == pytest.approx((statistics.mean(other), statistics.stdev(other) / 5**0.5))


def test_single_rows_and_equal_rows_prove_nothing() -> None:
    single = compare_paired(evaluation([0.0]), evaluation([9.0]))
    assert math.isinf(single.needed(1)) and not single.is_less(1)
    equal = compare_paired(evaluation([1.0, 2.0]), evaluation([1.0, 2.0]))
    assert equal.value == 0 and not equal.is_less(1)
