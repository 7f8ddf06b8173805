"""Measured changes drawn towards expected ones: against scipy's likelihood, and where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from hawqtool.records import Score, UnitScores
from hawqtool.sensitivity.shrinkage import Trust, updated


def a_case(
    seed: int, units: int, scale: float, share: float, noise: float
) -> tuple[UnitScores, UnitScores, UnitScores]:
    """Expected scores, measured changes from w3g64, and the true changes."""
    random = np.random.default_rng(seed)
    expected: UnitScores = {}
    measured: UnitScores = {}
    truth: UnitScores = {}
    for number in range(units):
        size = math.exp(random.normal())
        values = {"w2g64": 4 * size, "w3g64": size, "w4g64": size / 4}
        unit = f"u{number}"
        expected[unit] = {label: Score(value, 0.1) for label, value in values.items()}
        measured[unit], truth[unit] = {}, {}
        for label in ("w2g64", "w4g64"):
            level = max(values[label], values["w3g64"])
            true = scale * (values[label] - values["w3g64"]) + share * level * random.normal()
            error = noise * math.exp(random.normal())
            truth[unit][label] = Score(true, 0.0)
            measured[unit][label] = Score(true + error * random.normal(), error)
    return expected, measured, truth


def present(expected: UnitScores) -> dict[str, str]:
    return dict.fromkeys(expected, "w3g64")


def likelihood(expected: UnitScores, measured: UnitScores, scale: float, share: float) -> float:
    total = 0.0
    for unit, found in measured.items():
        for label, score in found.items():
            first, second = expected[unit][label].value, expected[unit]["w3g64"].value
            deviation = math.sqrt(score.stderr**2 + (share * max(abs(first), abs(second))) ** 2)
            total += norm.logpdf(score.value, scale * (first - second), deviation)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scale", "share", "noise"), [(1.0, 0.5, 0.1), (0.6, 0.1, 1.0), (1.5, 1.0, 0.5)])
def test_the_trust_is_what_makes_the_measurement_most_likely(
    seed: int, scale: float, share: float, noise: float
) -> None:
    expected, measured, _ = a_case(seed, 40, scale, share, noise)
    _, trust = updated(expected, measured, present(expected))
    best = minimize(
        lambda x: -likelihood(expected, measured, x[0], math.exp(x[1])), [1.0, math.log(0.3)], method="Nelder-Mead"
    )
    # Shares are tried in steps of the fourth root of 2.
    assert likelihood(expected, measured, *trust) >= -best.fun - 0.5
    assert trust.scale == pytest.approx(best.x[0], abs=0.1)


def test_each_change_is_the_mean_of_both_by_their_precisions() -> None:
    expected, measured, _ = a_case(5, 20, 0.8, 0.3, 0.5)
    result, trust = updated(expected, measured, present(expected))
    for unit, found in measured.items():
        base = expected[unit]["w3g64"].value
        assert result[unit]["w3g64"].value == base
        for label, score in found.items():
            prior = trust.scale * (expected[unit][label].value - base)
            spread = trust.share * max(abs(expected[unit][label].value), abs(base))
            precisions = 1 / spread**2, 1 / score.stderr**2
            mean = (prior * precisions[0] + score.value * precisions[1]) / sum(precisions)
            assert result[unit][label].value - base == pytest.approx(mean, rel=1e-9, abs=1e-12)
            assert result[unit][label].stderr == pytest.approx(sum(precisions) ** -0.5, rel=1e-9)


def squared_error(found: UnitScores, truth: UnitScores, base: UnitScores | None = None) -> float:
    total = 0.0
    for unit, changes in truth.items():
        start = base[unit]["w3g64"].value if base else 0.0
        total += sum((found[unit][label].value - start - true.value) ** 2 for label, true in changes.items())
    return total


@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_it_is_nearer_to_the_truth_than_either_alone(noise: float) -> None:
    ours, alone, prior = 0.0, 0.0, 0.0
    for seed in range(10):
        expected, measured, truth = a_case(seed, 200, 0.7, 0.3, noise)
        result, _ = updated(expected, measured, present(expected))
        ours += squared_error(result, truth, result)
        alone += squared_error(measured, truth)
        prior += squared_error(expected, truth, expected)
    assert ours < alone
    assert ours < prior


def test_certain_changes_are_kept_and_hopeless_ones_give_way() -> None:
    expected, measured, truth = a_case(1, 100, 1.0, 0.5, 1e-6)
    result, _ = updated(expected, measured, present(expected))
    assert squared_error(result, truth, result) < 1e-8 * squared_error(expected, truth, expected)
    noisy = {unit: {label: Score(s.value, 1e6) for label, s in found.items()} for unit, found in measured.items()}
    result, trust = updated(expected, noisy, present(expected))
    for unit, found in result.items():
        for label, score in found.items():
            scaled = trust.scale * (expected[unit][label].value - expected[unit]["w3g64"].value)
            assert score.value == pytest.approx(expected[unit]["w3g64"].value + scaled, rel=1e-6)


def test_expectations_that_point_the_wrong_way_are_dropped() -> None:
    expected, measured, _ = a_case(2, 50, -1.0, 0.05, 0.01)
    _, trust = updated(expected, measured, present(expected))
    assert trust.scale == 0.0


def test_what_was_not_expected_is_taken_as_measured() -> None:
    measured = {"u": {"w2g64": Score(0.5, 0.1)}, "v": {"w4g64": Score(-0.25, float("nan"))}}
    expected = {"v": {"w3g64": Score(0.75, 0.0)}, "w": {"w3g64": Score(1.0, 0.0), "w4g64": Score(0.5, 0.0)}}
    result, trust = updated(expected, measured, dict.fromkeys("uvw", "w3g64"))
    assert trust == Trust(1.0, 0.0)
    assert result["u"] == {"w3g64": Score(0.0, 0.0), "w2g64": Score(0.5, 0.1)}
    assert result["v"]["w4g64"].value == 0.5
    assert result["w"] == expected["w"]


def test_units_that_were_not_measured_are_scaled_like_the_others() -> None:
    expected, measured, _ = a_case(3, 50, 0.5, 0.01, 0.001)
    left = measured.pop("u0")
    result, trust = updated(expected, measured, present(expected))
    assert trust.scale == pytest.approx(0.5, abs=0.05)
    assert result["u0"]["w2g64"].value - result["u0"]["w3g64"].value == pytest.approx(left["w2g64"].value, rel=0.2)


def test_a_single_row_has_no_error_and_is_believed() -> None:
    expected, measured, truth = a_case(4, 30, 1.0, 0.5, 1e-9)
    blind = {u: {n: Score(s.value, float("nan")) for n, s in found.items()} for u, found in measured.items()}
    result, _ = updated(expected, blind, present(expected))
    assert squared_error(result, truth, result) < 1e-12
