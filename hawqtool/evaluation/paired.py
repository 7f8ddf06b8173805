"""Paired comparison of two models over rows of several sources: Student's t with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hawqtool.evaluation.divergence import standard_error
from hawqtool.records import Evaluation

LEVEL = 0.05
"""Chance at which one of the plans that are tried seems better than uniform without being so."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference in divergence of two models on the same rows; every source of rows counts alike.

    Args:
        value: Mean over sources of the mean over their rows.
        stderr: Its standard error; NaN where a source has one row.
        freedom: Degrees of freedom, of Welch and Satterthwaite where there are several sources.
        by_source: Mean and standard error of each source.
        base: Divergence of the second model, sources counting alike; NaN where it is not known.
    """

    value: float
    stderr: float
    freedom: float
    by_source: Mapping[str, tuple[float, float]]
    base: float = math.nan

    def needed(self, tried: int) -> float:
        """Standard errors by which the best of ``tried`` models must be better: t at 1 - 0.05 / tried, one-sided.

        This is Holm's first step (Holm 1979): the smallest of so many p-values is compared with the level over their
        number.
        """
        from scipy.special import stdtrit  # a moment to load, and most commands have no use for it

        return float(stdtrit(self.freedom, 1 - LEVEL / tried)) if self.freedom > 0 else math.inf

    def is_less(self, tried: int, noise: float = 0.0) -> bool:
        """Whether the first model is better for sure, it being the best of ``tried``.

        No source may be worse by more than its own standard error: what one text gains another must not lose.

        Args:
            tried: Models of which it is the best.
            noise: Standard error that rows know nothing of.
        """
        loses = any(value > stderr for value, stderr in self.by_source.values())
        return self.value < -self.needed(tried) * math.hypot(self.stderr, noise) and not loses


def compare_paired(first: Evaluation, second: Evaluation) -> PairedDifference:
    """``first - second`` in divergence; both on the same rows."""
    rows, other = (torch.tensor(e.row_divergence, dtype=torch.float64) for e in (first, second))
    return replace(paired_rows(rows - other, first.sources), base=balanced_divergence(second))


def paired_rows(differences: Tensor, sources: tuple[str, ...]) -> PairedDifference:
    """The comparison from the difference of every row, ``[rows]`` float64, and its source; of one source if none."""
    found = {name: part for name, part in _by_source(differences, sources).items() if len(part)}
    means = {name: (float(part.mean()), standard_error(part)) for name, part in found.items()}
    variances = {name: (stderr / len(means)) ** 2 for name, (_, stderr) in means.items()}
    spread = math.fsum(variances.values())
    weights = math.fsum(v**2 / (len(found[name]) - 1) for name, v in variances.items() if len(found[name]) > 1)
    freedom = spread**2 / weights if weights > 0 else float(min(map(len, found.values())) - 1)
    value = math.fsum(mean for mean, _ in means.values()) / len(means)
    return PairedDifference(value, math.sqrt(spread), freedom, means)


def balanced_divergence(evaluation: Evaluation) -> float:
    """Mean over sources of the mean divergence of their rows; the mean of all rows where there is one source."""
    if len(set(evaluation.sources)) < 2:
        return evaluation.divergence
    parts = _by_source(torch.tensor(evaluation.row_divergence, dtype=torch.float64), evaluation.sources)
    return math.fsum(float(part.mean()) for part in parts.values()) / len(parts)


def _by_source(values: Tensor, sources: tuple[str, ...]) -> dict[str, Tensor]:
    """Values of rows by the source of the row; all under one name where nothing is known of sources."""
    if not sources:
        return {"": values}
    names = dict.fromkeys(sources)
    return {name: values[[index for index, source in enumerate(sources) if source == name]] for name in names}
