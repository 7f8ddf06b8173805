"""The rule that people use: which units it favours, and that it uses up its bytes."""

from __future__ import annotations

import random

import pytest

from hawqtool.allocation.problem import AllocationProblem, build_problem
from hawqtool.allocation.role_rule import is_favoured, role_plan
from hawqtool.errors import UsageError
from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.records import LinearSpec, Score, Unit, UnitFormats

BLOCKS = 6
MENU = tuple(QuantFormat(bits, size) for bits in (2, 3, 4) for size in (CHANNEL, 64, 32)) + (QuantFormat(8, CHANNEL),)
FINENESS = {CHANNEL: 1.3, 64: 1.1, 32: 1.0}


def unit(name: str, block: int, *members: str) -> Unit:
    return Unit(name, tuple(LinearSpec(f"{block}.{m}", 64, 128, block, name, 2) for m in members or (name,)))


def make_units() -> list[Unit]:
    """Per block fused q, k, v, the output, fused gate and up, and down."""
    return [
        unit(f"{block}.{name}", block, *members)
        for block in range(BLOCKS)
        for name, members in (
            ("qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
            ("o", ("attn.o_proj",)),
            ("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
            ("down", ("mlp.down_proj",)),
        )
    ]


def problem_of(units: list[Unit], pins: UnitFormats | None = None) -> AllocationProblem:
    scores = {u.name: {f.label: Score(4.0**-f.bits * FINENESS[f.group_size], 0.0) for f in MENU} for u in units}
    return build_problem(units, {u.name: MENU for u in units}, scores, pins or {})


@pytest.mark.parametrize(
    ("names", "favoured"),
    [
        (("attn.q_proj", "attn.k_proj", "attn.v_proj"), True),
        (("mlp.down_proj",), True),
        (("h.mlp.c_proj",), True),
        (("layer.3.output.dense",), True),
        (("layer.3.attention.output.dense",), False),
        (("attn.o_proj",), False),
        (("mlp.gate_proj", "mlp.up_proj"), False),
        (("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj"), False),
        (("mlp.experts.0.w2", "mlp.experts.1.w2"), True),
    ],
)
def test_roles(names: tuple[str, ...], favoured: bool) -> None:
    assert is_favoured(unit("u", 2, *names), BLOCKS - 1) is favoured
    assert is_favoured(unit("u", 0, *names), BLOCKS - 1) and is_favoured(unit("u", BLOCKS - 1, *names), BLOCKS - 1)


def test_favoured_units_have_one_bit_more() -> None:
    units = make_units()
    last = BLOCKS - 1
    base, raised = QuantFormat(3, 64), QuantFormat(4, 64)
    budget = sum(u.stored_bytes(raised if is_favoured(u, last) else base) for u in units)
    problem = problem_of(units)
    plan = role_plan(problem, units, budget)
    widths = {u.name: plan.formats[u.name].bits for u in units}
    assert plan.stored_bytes <= budget
    assert min(widths[u.name] for u in units if is_favoured(u, last)) >= max(
        widths[u.name] for u in units if not is_favoured(u, last)
    )
    assert set(widths.values()) == {3, 4}


@pytest.mark.parametrize("seed", range(20))
def test_budget_and_pins_hold_and_bytes_are_used(seed: int) -> None:
    units, rng = make_units(), random.Random(seed)
    pins = {u.name: QuantFormat(8, 64) for u in rng.sample(units, 3)}
    problem = problem_of(units, pins)
    budget = rng.randint(problem.minimum_bytes, problem.maximum_bytes)
    plan = role_plan(problem, units, budget)
    assert plan.stored_bytes == sum(u.stored_bytes(plan.formats[u.name]) for u in units) <= budget
    assert all(plan.formats[name] == fmt for name, fmt in pins.items())
    # What is left is less than any unit's next dearer format would take.
    steps = [
        options[i + 1].cost_bytes - options[i].cost_bytes
        for name, options in problem.choices.items()
        for i in [[c.quant_format for c in options].index(plan.formats[name])]
        if i + 1 < len(options)
    ]
    assert budget - plan.stored_bytes < min(steps, default=budget + 1)
    assert plan == role_plan(problem, units[::-1], budget)
    with pytest.raises(UsageError, match="cannot be met"):
        role_plan(problem, units, problem.minimum_bytes - 1)
