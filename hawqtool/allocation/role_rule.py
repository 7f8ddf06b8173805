"""The rule that people use: one bit more for value and down projections and for the first and last block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from hawqtool.allocation.problem import AllocationProblem, Choice, require_feasible
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.records import BitPlan, Unit

_VALUE = re.compile(
    r"(^|\.)(v_proj|v_b_proj|kv_b_proj|qkv_proj|qkv|query_key_value|c_attn|Wqkv|W_pack|wqkv|wv|value|v_lin|v)$"
)
_DOWN = re.compile(
    r"(^|\.)(down_proj|w2|fc2|fc_out|dense_4h_to_h|lin2|DenseReluDense\.wo|mlp\.(c_proj|wo)|(?<!attention\.)output\.dense)$"
)

_Chosen = dict[str, int]
"""Place of each unit's choice among its choices."""


def is_favoured(unit: Unit, last_block: int) -> bool:
    """Whether the rule gives a unit one bit more.

    Engines fuse q, k, v, which rise together. All routed experts of a block, or of a model, are one unit: it rises
    where it lies at the edges alone, as otherwise almost the whole model would.
    """
    if all(member.block in (0, last_block) for member in unit.members):
        return True
    names = [member.name for member in unit.members]
    if any(map(is_expert, names)):
        return all(map(_DOWN.search, names))
    return all(map(_DOWN.search, names)) or any(map(_VALUE.search, names))


def role_plan(problem: AllocationProblem, units: Sequence[Unit], budget_bytes: int) -> BitPlan:
    """The plan of the rule within a budget, its bytes used up as far as they go.

    From one format everywhere on, favoured units take the next wider one, the outermost blocks first, as far as that
    fits. What is left goes, in the same order, to the next dearer choices of all units. Of the formats to begin with
    the one of least predicted loss is taken, so that the rule is as strong a rival as it can be.

    Args:
        problem: The problem; pinned units have one choice and keep it.
        units: The units of the problem.
        budget_bytes: Most stored bytes allowed.

    Raises:
        UsageError: If even the cheapest choices exceed the budget.
    """
    require_feasible(problem, budget_bytes)
    last = max((member.block for unit in units for member in unit.members), default=0)
    favoured = {unit.name for unit in units if is_favoured(unit, last)}

    def place(unit: Unit) -> tuple[bool, int, int, str]:
        outermost = min((min(m.block, last - m.block), m.block) for m in unit.members)
        return unit.name not in favoured, *outermost, unit.name

    order = [unit.name for unit in sorted(units, key=place)]
    plans = [_from_base(problem, base, order, favoured, budget_bytes) for base in _bases(problem)]
    fitting = [plan for plan in plans if _bytes(problem, plan) <= budget_bytes]
    chosen = min(fitting, key=lambda plan: (_loss(problem, plan), -_bytes(problem, plan)))
    return BitPlan(
        formats={unit: problem.choices[unit][index].quant_format for unit, index in chosen.items()},
        stored_bytes=_bytes(problem, chosen),
        num_weights=problem.num_weights,
        budget_bytes=budget_bytes,
        predicted_loss=_loss(problem, chosen),
        solver="rule",
    )


def _bases(problem: AllocationProblem) -> Iterator[_Chosen]:
    """One format everywhere, as far as units may take it: first the cheapest choices, then by width and group size."""
    yield dict.fromkeys(problem.choices, 0)
    kinds = {(c.quant_format.bits, _fineness(c)) for options in problem.choices.values() for c in options}
    for bits, fineness in sorted(kinds):
        yield {unit: _at(options, bits, fineness) for unit, options in problem.choices.items()}


def _fineness(choice: Choice) -> float:
    """Scales per weight; 0 for whole rows."""
    return 1 / choice.quant_format.group_size if choice.quant_format.group_size else 0.0


def _at(options: Sequence[Choice], bits: int, fineness: float) -> int:
    """Place of the choice of a width and a group size: the finest that is no finer, else the nearest narrower width."""
    same = [i for i, choice in enumerate(options) if choice.quant_format.bits == bits]
    if not same:
        return max((i for i, c in enumerate(options) if c.quant_format.bits < bits), default=0)
    fitting = [i for i in same if _fineness(options[i]) <= fineness]
    return max(fitting, key=lambda i: _fineness(options[i])) if fitting else same[0]


def _from_base(
    problem: AllocationProblem, base: _Chosen, order: Sequence[str], favoured: set[str], budget_bytes: int
) -> _Chosen:
    chosen, slack = dict(base), budget_bytes - _bytes(problem, base)
    for unit in (unit for unit in order if unit in favoured):
        slack = _raise(problem.choices[unit], chosen, unit, _wider(problem.choices[unit], chosen[unit]), slack)
    raised = True
    while raised and slack > 0:
        before = slack
        for unit in order:
            slack = _raise(problem.choices[unit], chosen, unit, chosen[unit] + 1, slack)
        raised = slack < before
    return chosen


def _wider(options: Sequence[Choice], index: int) -> int:
    """Place of the next wider format of like groups; beyond the last one where there is none."""
    present = options[index]
    wider = [c.quant_format.bits for c in options if c.quant_format.bits > present.quant_format.bits]
    return _at(options, min(wider), _fineness(present)) if wider else len(options)


def _raise(options: Sequence[Choice], chosen: _Chosen, unit: str, target: int, slack: int) -> int:
    """Give a unit a dearer choice if that exists and fits; the slack that is left."""
    if target >= len(options):
        return slack
    step = options[target].cost_bytes - options[chosen[unit]].cost_bytes
    if not 0 <= step <= slack:
        return slack
    chosen[unit] = target
    return slack - step


def _bytes(problem: AllocationProblem, chosen: _Chosen) -> int:
    return sum(problem.choices[unit][index].cost_bytes for unit, index in chosen.items())


def _loss(problem: AllocationProblem, chosen: _Chosen) -> float:
    return math.fsum(problem.choices[unit][index].loss for unit, index in chosen.items())
