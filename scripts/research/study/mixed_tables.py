"""Tables of what `study_mixed.py` has judged: shipped plans beside uniform ones, their curve, and the rule."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.evaluation.divergence import standard_error
from hawqtool.pipeline.search.shortlist import RULE

Line = Mapping[str, Any]
"""Of the file: a plan, and its rows on every text."""
Relative = dict[str, tuple[float, float]]
"""Difference by text and its standard error over rows, as shares of what it is a difference to."""

FAR = 0.1
"""Bits that the budget must lie above the best uniform plan for the curve to say more than that plan does."""
_BEYOND = 2.0
_SHIPPED, _UNIFORM, _RULE, _ANCHOR = "shipped", "uniform", "rule", "anchor"
_CURVE = "curve"


@dataclass(frozen=True)
class Entry:
    """What there is at one budget of a model and a draw.

    Args:
        shipped: The shipped plan.
        others: The best uniform plan that fits, and that of the rule, as far as they were judged.
        anchors: Larger uniform plans of the draw, by rising bits.
    """

    shipped: Line
    others: Mapping[str, Line]
    anchors: Sequence[Line]

    @property
    def name(self) -> tuple[str, float, int]:
        """Model, bits and draw."""
        return self.shipped["model"], self.shipped["budget"], self.shipped["seed"]

    def differences(self) -> dict[str, Relative]:
        """The shipped plan less the others and less the curve; nothing where a plan is compared with itself."""
        found = {role: {text: _rows(line, text) for text in line["texts"]} for role, line in self.others.items()}
        uniform, bits = self.others.get(_UNIFORM), self.shipped["budget"]
        above = next((line for line in self.anchors if uniform and bits <= line["bpw"] > uniform["bpw"]), None)
        if uniform is not None and above is not None and bits - uniform["bpw"] > FAR:
            found[_CURVE] = curve(uniform, above, bits)
        if self.shipped["kind"] == _UNIFORM:
            found = {role: rows for role, rows in found.items() if role == _RULE}
        return {role: _relative(self.shipped, rows) for role, rows in found.items()}

    @property
    def gain(self) -> float | None:
        """Mean difference to the curve, where there is none to uniform; None where neither was judged."""
        if self.shipped["kind"] == _UNIFORM:
            return 0.0
        found = self.differences()
        judged = found.get(_CURVE) or found.get(_UNIFORM)
        return None if judged is None else mean_over_texts(judged)[0]


def curve(below: Line, above: Line, bits: float) -> dict[str, Tensor]:
    """Row values by text of the uniform curve, log KL being linear in bits between two plans.

    With the share t the curve is C = exp((1 - t) log A + t log B). Its row values are those to first order,
    C ((1 - t) a_n / A + t b_n / B), which average to C; so differences to it are paired by rows.
    """
    share, found = (bits - below["bpw"]) / (above["bpw"] - below["bpw"]), {}
    for text in below["texts"]:
        first, second = _rows(below, text), _rows(above, text)
        level = torch.exp((1 - share) * first.mean().log() + share * second.mean().log())
        found[text] = level * ((1 - share) * first / first.mean() + share * second / second.mean())
    return found


def _rows(line: Line, text: str) -> Tensor:
    return torch.tensor(line["texts"][text]["rows"], dtype=torch.float64)


def _relative(shipped: Line, others: Mapping[str, Tensor]) -> Relative:
    found: Relative = {}
    for text, rows in others.items():
        difference, whole = _rows(shipped, text) - rows, float(rows.mean())
        found[text] = float(difference.mean()) / whole, standard_error(difference) / whole
    return found


def mean_over_texts(found: Relative) -> tuple[float, float]:
    """Mean of the texts' differences, and its standard error."""
    values = list(found.values())
    return sum(v for v, _ in values) / len(values), math.sqrt(sum(e**2 for _, e in values)) / len(values)


def entries(paths: Iterable[Path]) -> list[Entry]:
    """Everything that was shipped, by model, bits and draw."""
    lines = [json.loads(text) for path in paths for text in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for shipped in (line for line in lines if line["role"] == _SHIPPED):
        draw = [line for line in lines if (line["model"], line["seed"]) == (shipped["model"], shipped["seed"])]
        beside = [line for line in draw if line["budget"] == shipped["budget"]]
        others = {role: line for role in (_UNIFORM, _RULE) for line in beside if line["role"] == role}
        anchors = sorted((line for line in draw if line["role"] == _ANCHOR), key=lambda line: line["bpw"])
        found.append(Entry(shipped, others, anchors))
    return sorted(found, key=lambda entry: entry.name)


def tables(paths: Iterable[Path]) -> str:
    """Markdown: the means over texts, what they come to, and every text by itself."""
    found = entries(paths)
    names = list(dict.fromkeys(text for entry in found for text in entry.shipped["texts"]))
    head = ["model", "bits", "draw", "uniform", f"KL ({', '.join(names)})", "shipped", "stored bits", "to uniform"]
    lines = _table([*head, "to the curve", "to the rule"], map(_means, found))
    lines += ["", *_summary(found), ""]
    each = [row for entry in found for row in _texts(entry, names)]
    return "\n".join(lines + _table(["model", "bits", "draw", "compared with", *names], each)) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _place(entry: Entry) -> list[str]:
    model, bits, seed = entry.name
    return [model, f"{bits:g}", str(seed)]


def _means(entry: Entry) -> list[str]:
    uniform, shipped, found = entry.others.get(_UNIFORM), entry.shipped, entry.differences()
    same = shipped["kind"] == _UNIFORM
    judged = "the uniform plan" if same else _levels(shipped) + (" (the rule)" if shipped["label"] == RULE else "")
    beside = [f"`{uniform['label']}`", _levels(uniform)] if uniform else ["", _levels(shipped) if same else ""]
    differences = [_shown(mean_over_texts(found[role])) if role in found else "" for role in (_UNIFORM, _CURVE, _RULE)]
    return [*_place(entry), *beside, judged, f"{shipped['bpw']:.4f}", *differences]


def _levels(line: Line) -> str:
    return ", ".join(f"{text['kl']:.3f}" for text in line["texts"].values())


def _shown(difference: tuple[float, float]) -> str:
    value, error = (100 * part for part in difference)
    return f"{_signed(value, 1)} ± {error:.1f} %"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _texts(entry: Entry, names: Sequence[str]) -> list[list[str]]:
    return [
        [*_place(entry), role, *(_shown(found[text]) if text in found else "" for text in names)]
        for role, found in entry.differences().items()
    ]


def _summary(found: Sequence[Entry]) -> list[str]:
    lines = [_worse(found, "with uniform plans or the curve", False), _worse(found, "with the rule", True)]
    gains = [(entry.name, gain) for entry in found if (gain := entry.gain) is not None]
    if not gains:
        return lines
    lines += ["", f"Mean over the rows, of the curve where there is one: {_percent([gain for _, gain in gains])}."]
    for title in ("model", "bits"):
        by_key: dict[str, list[float]] = {}
        for name, gain in gains:
            by_key.setdefault(name[0] if title == "model" else f"{name[1]:g}", []).append(gain)
        lines.append(f"By {title}: {', '.join(f'{key} {_percent(values)}' for key, values in by_key.items())}.")
    return lines


def _worse(found: Sequence[Entry], title: str, rule: bool) -> str:
    """How many comparisons there are, one text each, and which are above zero for sure."""
    count, named = 0, []
    for entry in found:
        for role, by_text in entry.differences().items():
            if (role == _RULE) == rule:
                count += len(by_text)
                where = f"{entry.name[0]} at {entry.name[1]:g} bits, draw {entry.name[2]}"
                above = {text: pair for text, pair in by_text.items() if pair[0] > _BEYOND * pair[1]}
                named += [f"{where}, {text}, {role} {_shown(pair)}" for text, pair in above.items()]
    list_of = f": {'; '.join(named)}" if named else ""
    return f"- {count} comparisons {title}, {len(named)} above zero beyond two standard errors{list_of}"


def _percent(values: Sequence[float]) -> str:
    return f"{_signed(100 * sum(values) / len(values), 1)} %"
