"""Measured changes of the divergence, drawn towards the expected ones as far as they are noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.records import Score
from hawqtool.sensitivity.measured_kl import UnitScores

_SHARES = tuple(2.0 ** (power / 4) for power in range(-32, 9))
"""Shares of a score by which an expectation may be off that are tried: 0.4 % to 4 times the score."""


class Trust(NamedTuple):
    """How far measured changes bear expectations out.

    Args:
        scale: Measured change per expected one; not negative.
        share: Standard deviation of what an expectation misses, as a share of the larger of the two scores behind it.
    """

    scale: float
    share: float


def updated(expected: UnitScores, measured: UnitScores, present: Mapping[str, str]) -> tuple[UnitScores, Trust]:
    """Scores that agree with what was expected and with what was measured at a plan, each as far as it is certain.

    A few hundred changes are measured on few rows, and a plan takes the best of them: what looks best is in part what
    errs most. So a change m with standard error s, expected to be e, is taken for
    c e + t² / (t² + s²) (m - c e), its mean given both where m is normal about the true change and the true change is
    normal about c e with deviation t. Both c and t, as a share of the scores that e is the difference of, are what
    makes all measured changes together most likely (empirical Bayes, as in Efron and Morris, JASA 1973).

    Args:
        expected: ``[unit][label]`` scores by any metric, or what the last update returned.
        measured: ``[unit][label]`` change of the divergence where the unit takes that format instead of its present
            one.
        present: Label of every unit's present format.

    Returns:
        ``[unit][label]`` for everything in ``expected`` and in ``measured``: the present format's score (0 where none
        was expected) and, relative to it, the others'. And what came out for c and t.
    """
    known = [(unit, label) for unit, found in measured.items() for label in found]
    places = [(u, n) for u, n in known if n != present[u] and {n, present[u]} <= expected.get(u, {}).keys()]
    trust = Trust(1.0, 0.0)
    means: dict[tuple[str, str], Score] = {}
    if places:
        trust, means = _shrunk(expected, measured, present, places)
    result = {unit: _scaled(found, present.get(unit), trust.scale) for unit, found in expected.items()}
    for unit, label in known:
        scores = result.setdefault(unit, {})
        base = scores.setdefault(present[unit], Score(0.0, 0.0)).value
        change = means.get((unit, label), measured[unit][label])
        scores[label] = Score(base + change.value, change.stderr)
    return result, trust


def _shrunk(
    expected: UnitScores, measured: UnitScores, present: Mapping[str, str], places: Sequence[tuple[str, str]]
) -> tuple[Trust, dict[tuple[str, str], Score]]:
    """Posterior means and deviations of the changes at some places."""
    scores = [measured[unit][label] for unit, label in places]
    pairs = [(expected[unit][label].value, expected[unit][present[unit]].value) for unit, label in places]
    change = torch.tensor([score.value for score in scores], dtype=torch.float64)
    noise = torch.tensor([score.stderr for score in scores], dtype=torch.float64).nan_to_num(0.0).square()
    both = torch.tensor(pairs, dtype=torch.float64)
    prior, level = both[:, 0] - both[:, 1], both.abs().amax(1).square()
    trust = min((_fit(change, noise, prior, level, share) for share in _SHARES), key=lambda found: found[0])[1]
    spread = trust.share**2 * level
    weight = spread / (spread + noise).clamp(min=torch.finfo(torch.float64).tiny)
    mean = trust.scale * prior + weight * (change - trust.scale * prior)
    errors = (weight * noise).sqrt()
    return trust, dict(zip(places, map(Score, mean.tolist(), errors.tolist()), strict=True))


def _fit(change: Tensor, noise: Tensor, prior: Tensor, level: Tensor, share: float) -> tuple[float, Trust]:
    """Negative log-likelihood, up to a constant, of the changes under the best scale for a share; and both."""
    variance = (noise + share**2 * level).clamp(min=torch.finfo(torch.float64).tiny)
    square = float((prior.square() / variance).sum())
    scale = max(0.0, float((change * prior / variance).sum()) / square) if square > 0 else 0.0
    surprise = ((change - scale * prior).square() / variance + variance.log()).sum()
    return float(surprise) if math.isfinite(surprise) else math.inf, Trust(scale, share)


def _scaled(scores: Mapping[str, Score], present: str | None, scale: float) -> dict[str, Score]:
    """Scores whose distance from the present format's is scaled; as they are where that has none."""
    if present is None or present not in scores:
        return dict(scores)
    base = scores[present].value
    return {label: Score(base + scale * (score.value - base), scale * score.stderr) for label, score in scores.items()}
