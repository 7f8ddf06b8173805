"""What a measured plan is compared with in studies: the same scores on the wrong units."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

from hawqtool.formats import parse_label
from hawqtool.records import Unit, UnitScores


def permuted_scores(units: Sequence[Unit], scores: UnitScores, seed: int) -> UnitScores:
    """Scores dealt out anew among units of equal shape: their distribution stays, what they say of a unit goes.

    Units are of equal shape if their members have the same shapes in the same order and the same formats were
    measured; one without its like keeps its scores.

    Args:
        units: Units whose scores are permuted.
        scores: Unit name to format label to score.
        seed: Seed of the permutation; the order of units does not matter.

    Returns:
        Unit name to format label to score, for the same units.
    """
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for unit in sorted(units, key=lambda unit: unit.name):
        shapes = tuple((m.out_features, m.in_features, m.scale_bytes) for m in unit.members)
        groups[shapes, frozenset(scores[unit.name])].append(unit.name)
    rng, dealt = random.Random(seed), {}
    for names in groups.values():
        sources = rng.sample(names, len(names))
        dealt.update({name: dict(scores[source]) for name, source in zip(names, sources, strict=True)})
    return {unit.name: dealt[unit.name] for unit in units}


def reversed_scores(units: Sequence[Unit], scores: UnitScores) -> UnitScores:
    """The ranking of units turned round: the most sensitive one gets the scores of the least sensitive one.

    Units are ranked by their score at the smallest width (ties by name), among those that were measured at the same
    widths. Whole tables change hands, width for width (group sizes may differ), so that where more bits did not hurt
    the old owner they do not hurt the new one.

    Args:
        units: Units whose scores are turned round.
        scores: Unit name to format label to score.

    Returns:
        Unit name to format label to score, for the same units.
    """
    labels = {unit.name: sorted(scores[unit.name], key=parse_label) for unit in units}
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, found in labels.items():
        groups[tuple(parse_label(label).bits for label in found)].append(name)
    turned = {}
    for names in groups.values():
        ranked = sorted(names, key=lambda name: (*(scores[name][label].value for label in labels[name][:1]), name))
        for name, source in zip(ranked, reversed(ranked), strict=True):
            pairs = zip(labels[name], labels[source], strict=True)
            turned[name] = {own: scores[source][other] for own, other in pairs}
    return {unit.name: turned[unit.name] for unit in units}
