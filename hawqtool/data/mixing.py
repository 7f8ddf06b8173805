"""Sets of rows drawn from weighted sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.data.tokens import fingerprint
from hawqtool.errors import InputError
from hawqtool.records import Rows

SMALLEST_SET = 8
"""Rows of a set that scores or chooses, at least."""

_SCORING_SET, _SHORT_ROW = 16, 512
_SCORING_PARTS = {"cpu": 16, "cuda": 4}
"""One in so many calibration rows there are to score: on a GPU they cost little beside the rest."""


def row_counts(
    num_samples: int, selection_samples: int, eval_samples: int, length: int | None, device: str
) -> dict[str, int]:
    """Rows of each set: rounding, scoring, selecting a plan, reporting.

    Args:
        num_samples: Calibration rows.
        selection_samples: Rows that choose.
        eval_samples: Rows to report on.
        length: Tokens of a row; None for images.
        device: Kind of the device, ``cpu`` or ``cuda``.
    """
    scoring = scoring_rows(num_samples, length, device)
    return {"calibration": num_samples, "scoring": scoring, "selection": selection_samples, "report": eval_samples}


def scoring_rows(num_samples: int, length: int | None, device: str) -> int:
    """Rows to score on.

    Rows of less than 512 tokens are at least 16: noise falls with the rows, and short ones cost little.

    Args:
        num_samples: Calibration rows.
        length: Tokens of a row; None for images.
        device: Kind of the device, ``cpu`` or ``cuda``.
    """
    least = _SCORING_SET if length is None or length < _SHORT_ROW else SMALLEST_SET
    return max(least, num_samples // _SCORING_PARTS[device])


@dataclass(frozen=True)
class SourceRows:
    """What a source gives: ``tokens`` ``[rows, seq_len]`` int64, images or sounds; ``quota`` of them go to each set."""

    label: str
    tokens: Tensor
    quota: Mapping[str, int]


def shares(count: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights that add up to ``count``, by largest remainder."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for index in by_remainder[: count - sum(whole)]:
        whole[index] += 1
    return whole


def quotas(counts: Mapping[str, int], weights: Sequence[float]) -> list[dict[str, int]]:
    """Rows of each set that each source gives."""
    parts = {name: shares(count, weights) for name, count in counts.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(len(weights))]


def require_rows(sources: Sequence[SourceRows]) -> None:
    """Check that each source holds its rows.

    Raises:
        InputError: Otherwise; says how many each source that is short holds and which sets need how many.
    """
    short = [_shortage(source) for source in sources if len(source.tokens) < sum(source.quota.values())]
    if short:
        raise InputError(f"{'; '.join(short)}; give more, or lower --num-samples or --seq-len")


def equal_quotas(quotas_by_weight: Sequence[dict[str, int]], name: str, takes_part: Sequence[bool]) -> None:
    """Give the rows of one set in equal parts to the sources that take part in it, and none to the others."""
    count = sum(quota[name] for quota in quotas_by_weight)
    parts = iter(shares(count, [1.0] * sum(takes_part)))
    for quota, takes in zip(quotas_by_weight, takes_part, strict=True):
        quota[name] = next(parts) if takes else 0


def pieces(rows: Tensor, count: int, length: int, before: Sequence[int]) -> Tensor:
    """Shorter rows cut from longer ones: the first piece of each, then the second of each, and so on.

    Args:
        rows: ``[rows, seq_len]`` int64.
        count: Pieces that are wanted; fewer come of rows that do not hold as many.
        length: Tokens of a piece, at most ``seq_len``.
        before: Special tokens that rows begin with; where all of these do, all pieces do.

    Returns:
        ``[count, length]`` int64.
    """
    head = len(before) if before and bool((rows[:, : len(before)] == torch.tensor(before)).all()) else 0
    body = length - head
    found = [
        torch.cat([rows[:, :head], rows[:, first : first + body]], 1)
        for first in range(head, rows.shape[1] - body + 1, body)
    ]
    return torch.cat(found)[:count]


def mix_rows(sources: Sequence[SourceRows]) -> dict[str, Rows]:
    """Cut the rows of sources into named sets that share no row, sources interleaved evenly in each.

    Raises:
        InputError: If a source holds too few rows.
    """
    require_rows(sources)
    sets, taken = {}, [0] * len(sources)
    for name in sources[0].quota:
        drawn = []
        for index, source in enumerate(sources):
            count = source.quota[name]
            drawn += [((k + 0.5) / count, index, source.tokens[taken[index] + k]) for k in range(count)]
            taken[index] += count
        drawn.sort(key=lambda entry: entry[:2])
        tokens = torch.stack([row for _, _, row in drawn])
        labels = tuple(sources[index].label for _, index, _ in drawn)
        sets[name] = Rows(tokens, _label(sources, name), fingerprint(tokens), sources=labels)
    return sets


def _shortage(source: SourceRows) -> str:
    wanted = ", ".join(f"{count} {name}" for name, count in source.quota.items() if count)
    rows, *shape = source.tokens.shape
    held = f"{rows} rows" if source.tokens.is_floating_point() else f"{rows} rows of {shape[0]} tokens"
    return f"{source.label} holds {held}, {sum(source.quota.values())} are needed ({wanted})"


def _label(sources: Sequence[SourceRows], name: str) -> str:
    if len(sources) == 1:
        return sources[0].label
    return ", ".join(f"{source.label} ({source.quota[name]} rows)" for source in sources if source.quota[name])
