"""Allocation against brute force, pins, ignored layers and uniform plans."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import replace

import pytest

from hawqtool.allocation.frontier import efficient_choices, frontier, solve
from hawqtool.allocation.problem import (
    AllocationProblem,
    Choice,
    build_problem,
    ignored_along,
    resolve_ignored,
    resolve_pins,
)
from hawqtool.allocation.uniform import best_uniform, neighbours, uniform_formats, uniform_plans
from hawqtool.errors import InputError, UsageError
from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.records import LinearSpec, Score, Unit

WIDTHS = (2, 3, 4, 8)


def make_unit(name: str, shapes: list[tuple[int, int]], members: tuple[str, ...] = ("",)) -> Unit:
    specs = [
        LinearSpec(name + suffix, rows, columns, 0, name, 2)
        for suffix, (rows, columns) in zip(members, shapes, strict=True)
    ]
    return Unit(name, tuple(specs))


def make_block(index: int, hidden: int = 128) -> list[Unit]:
    prefix = f"model.layers.{index}"
    attention = tuple(
        LinearSpec(f"{prefix}.self_attn.{p}_proj", hidden, hidden, index, f"{prefix}.self_attn.qkv_proj", 2)
        for p in "qkv"
    )
    down = f"{prefix}.mlp.down_proj"
    return [
        Unit(f"{prefix}.self_attn.qkv_proj", attention),
        Unit(down, (LinearSpec(down, hidden, 2 * hidden, index, down, 2),)),
    ]


def random_scores(rng: random.Random, noisy: bool) -> dict[str, Score]:
    base = 10 ** rng.uniform(-4, 0)
    values = [base * 4.0 ** (2 - bits) for bits in WIDTHS]
    if noisy:
        values = [v + rng.gauss(0, 0.3 * base) for v in values]
    return {QuantFormat(bits, 32).label: Score(v, 0.0) for bits, v in zip(WIDTHS, values, strict=True)}


def random_problem(seed: int) -> AllocationProblem:
    """Few units of random shapes; every other seed has scores that are neither monotone nor all positive."""
    rng = random.Random(seed)
    units = [
        make_unit(f"u{i}", [(rng.choice([8, 24, 40, 96]), 32 * rng.randint(1, 5))]) for i in range(rng.randint(1, 6))
    ]
    scores = {unit.name: random_scores(rng, noisy=seed % 2 == 1) for unit in units}
    menu = {unit.name: tuple(QuantFormat(bits, 32) for bits in WIDTHS) for unit in units}
    return build_problem(units, menu, scores, {})


def all_plans(problem: AllocationProblem) -> list[tuple[int, float]]:
    """(bytes, loss) of every possible plan."""
    return [
        (sum(c.cost_bytes for c in plan), math.fsum(c.loss for c in plan))
        for plan in itertools.product(*problem.choices.values())
    ]


def budgets(problem: AllocationProblem, count: int = 25) -> list[int]:
    low, high = problem.minimum_bytes, problem.maximum_bytes
    return [low + (high - low) * i // (count - 1) for i in range(count)]


@pytest.mark.parametrize("seed", range(40))
def test_frontier_points_are_optimal_at_their_own_bytes(seed: int) -> None:
    problem = random_problem(seed)
    plans = all_plans(problem)
    curve = frontier(problem)
    assert curve.points[0][0] == problem.minimum_bytes
    assert len(curve.points) == len(curve.edges) + 1
    for stored, loss in curve.points:
        best = min(value for size, value in plans if size <= stored)
        assert loss == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert solve(problem, stored).stored_bytes == stored
    assert curve.points[-1][1] == pytest.approx(min(value for _, value in plans), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_solve_fits_and_stays_within_the_gap_bound(seed: int) -> None:
    problem = random_problem(seed)
    plans = all_plans(problem)
    curve = frontier(problem)
    for budget in budgets(problem):
        plan = solve(problem, budget, "kron")
        assert plan.stored_bytes <= budget
        assert plan.predicted_loss is not None
        best = min(value for size, value in plans if size <= budget)
        bound = curve.lower_bound(budget)
        edges_that_fit = sum(1 for stored, _ in curve.points if stored <= budget) - 1
        gap = curve.edges[edges_that_fit].gain if edges_that_fit < len(curve.edges) else 0.0
        assert bound - 1e-12 <= best <= plan.predicted_loss + 1e-12
        assert plan.predicted_loss <= bound + gap + 1e-12


@pytest.mark.parametrize("seed", range(60))
def test_larger_budgets_never_predict_larger_losses(seed: int) -> None:
    problem = random_problem(seed)
    losses = [solve(problem, budget).predicted_loss or 0.0 for budget in budgets(problem, 200)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_still_fits_is_left_on_the_table(seed: int) -> None:
    problem = random_problem(seed)
    for budget in budgets(problem):
        plan = solve(problem, budget)
        for unit, options in problem.choices.items():
            chosen = next(c for c in options if c.quant_format == plan.formats[unit])
            for other in options:
                fits = plan.stored_bytes - chosen.cost_bytes + other.cost_bytes <= budget
                assert not (fits and other.loss < chosen.loss), "a single-unit upgrade was left"


def test_a_costlier_format_with_a_higher_loss_is_never_chosen() -> None:
    fmt = {bits: QuantFormat(bits, 32) for bits in WIDTHS}
    options = (
        Choice(fmt[2], 100, 1.0),
        Choice(fmt[3], 150, -0.01),
        Choice(fmt[4], 200, 0.5),
        Choice(fmt[8], 400, -0.01),
    )
    assert [c.quant_format.bits for c in efficient_choices(options)] == [2, 3]
    plan = solve(AllocationProblem({"u": options}, 400), 1000)
    assert plan.formats == {"u": fmt[3]}
    assert plan.predicted_loss == pytest.approx(-0.01)


def test_slack_goes_to_a_choice_off_the_hull() -> None:
    fmt = {bits: QuantFormat(bits, 32) for bits in WIDTHS}
    # (150, 0.9) lies above the line from (100, 1.0) to (200, 0.0), but is all that 160 bytes can pay for.
    options = (Choice(fmt[2], 100, 1.0), Choice(fmt[3], 150, 0.9), Choice(fmt[4], 200, 0.0))
    problem = AllocationProblem({"u": options}, 400)
    assert [stored for stored, _ in frontier(problem).points] == [100, 200]
    assert solve(problem, 160).formats["u"].bits == 3
    assert frontier(problem).lower_bound(160) == pytest.approx(0.4)
    assert frontier(problem).lower_bound(99) == math.inf


def test_infeasible_budget_names_range_and_remedies() -> None:
    problem = random_problem(0)
    low, high = problem.minimum_bytes, problem.maximum_bytes
    with pytest.raises(UsageError) as caught:
        solve(problem, low - 1)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message
    for part in (f"{low - 1:,}", f"{low:,}", f"{high:,}", f"{problem.bpw(low):.3f}", "--bits", "--group-size", "pin"):
        assert part in message
    assert solve(problem, low).stored_bytes == low


def test_exchanging_scores_exchanges_bits() -> None:
    units = [make_unit(f"u{i}", [(64, 128)]) for i in range(6)]
    menu = {unit.name: tuple(QuantFormat(bits, 32) for bits in WIDTHS) for unit in units}
    rng = random.Random(5)
    scores = {unit.name: random_scores(rng, noisy=False) for unit in units}
    swapped = {**scores, "u1": scores["u4"], "u4": scores["u1"]}
    problem, other = build_problem(units, menu, scores, {}), build_problem(units, menu, swapped, {})
    differs = False
    for budget in budgets(problem):
        plan, swapped = solve(problem, budget).formats, solve(other, budget).formats
        assert swapped == {**plan, "u1": plan["u4"], "u4": plan["u1"]}
        differs |= plan["u1"] != plan["u4"]
    assert differs


def test_a_huge_score_takes_the_top_width() -> None:
    units = [make_unit(f"u{i}", [(64, 128)]) for i in range(6)]
    menu = {unit.name: tuple(QuantFormat(bits, 32) for bits in WIDTHS) for unit in units}
    scores = {unit.name: random_scores(random.Random(i), noisy=False) for i, unit in enumerate(units)}
    scores["u3"] = {label: replace(score, value=score.value * 1e6) for label, score in scores["u3"].items()}
    problem = build_problem(units, menu, scores, {})
    budget = problem.budget_bytes(3.5 + 0.5)
    plan = solve(problem, budget)
    assert plan.formats["u3"].bits == 8
    assert max(fmt.bits for name, fmt in plan.formats.items() if name != "u3") < 8


def test_the_order_of_units_does_not_matter() -> None:
    units = [make_unit(f"u{i}", [(64, 128)]) for i in range(6)]
    menu = {unit.name: tuple(QuantFormat(bits, 32) for bits in WIDTHS) for unit in units}
    same = random_scores(random.Random(1), noisy=False)
    scores = {unit.name: same for unit in units}
    forward, backward = build_problem(units, menu, scores, {}), build_problem(units[::-1], menu, scores, {})
    for budget in budgets(forward):
        assert solve(forward, budget).formats == solve(backward, budget).formats


def test_bytes_and_bits_per_weight_agree() -> None:
    problem = random_problem(4)
    for stored in budgets(problem):
        assert problem.budget_bytes(problem.bpw(stored)) == stored
    assert problem.minimum_bpw == problem.bpw(problem.minimum_bytes)
    assert solve(problem, problem.maximum_bytes).bpw <= problem.maximum_bpw


def test_thousands_of_units_solve_in_seconds() -> None:
    rng = random.Random(0)
    formats = tuple(QuantFormat(bits, 128) for bits in WIDTHS)
    shapes = [(512, 2048), (2048, 512), (1024, 1024)]
    choices = {}
    for index in range(18_624):
        rows, columns = rng.choice(shapes)
        values = [s.value for s in random_scores(rng, noisy=index % 3 == 0).values()]
        choices[f"u{index}"] = tuple(
            Choice(f, f.stored_bytes(rows, columns, 2), v) for f, v in zip(formats, values, strict=True)
        )
    problem = AllocationProblem(choices, 18_624 * 1024 * 1024)
    start = time.perf_counter()
    plan = solve(problem, problem.budget_bytes(3.5))
    print(f"18,624 units: {time.perf_counter() - start:.2f} s")
    assert plan.bpw <= 3.5
    bound = frontier(problem).lower_bound(problem.budget_bytes(3.5))
    assert plan.predicted_loss == pytest.approx(bound, rel=1e-3)


def test_pins_and_missing_scores() -> None:
    units = make_block(0)
    qkv, down = units[0].name, units[1].name
    menu = {unit.name: (QuantFormat(3, 32), QuantFormat(4, 32)) for unit in units}
    scores = {unit.name: {"w3g32": Score(0.5, 0.1), "w4g32": Score(0.1, 0.02)} for unit in units}
    problem = build_problem(units, menu, scores, {down: QuantFormat(8, 32), qkv: QuantFormat(3, 32)})
    assert [(c.quant_format.bits, c.loss) for c in problem.choices[down]] == [(8, 0.0)]
    assert [(c.quant_format.bits, c.loss) for c in problem.choices[qkv]] == [(3, 0.5)]
    assert problem.num_weights == 3 * 128 * 128 + 128 * 256
    del scores[down]["w4g32"]
    with pytest.raises(UsageError, match=r"down_proj in format w4g32 \(measured: w3g32\)"):
        build_problem(units, menu, scores, {})
    scores[down]["w4g32"] = Score(math.nan, 0.0)
    with pytest.raises(InputError, match="is nan"):
        build_problem(units, menu, scores, {})
    with pytest.raises(UsageError, match="pinned unit lm_head"):
        build_problem(units, menu, scores, {"lm_head": QuantFormat(8, 32)})
    with pytest.raises(UsageError, match="no format"):
        build_problem(units, {}, scores, {})
    with pytest.raises(UsageError, match="no layer is left"):
        build_problem([], {}, {}, {})


def test_resolve_pins_reaches_units_through_members() -> None:
    units = [*make_block(0), *make_block(1)]
    sizes = {unit.name: 64 if "down" in unit.name else 128 for unit in units}
    pins = resolve_pins(["re:.*down_proj=8", "model.layers.1.self_attn.k_proj=6"], units, sizes)
    assert pins == {
        "model.layers.0.mlp.down_proj": QuantFormat(8, 64),
        "model.layers.1.mlp.down_proj": QuantFormat(8, 64),
        "model.layers.1.self_attn.qkv_proj": QuantFormat(6, 128),
    }
    assert resolve_pins(["model.layers.0.self_attn.qkv_proj=3"], units, sizes) == {
        "model.layers.0.self_attn.qkv_proj": QuantFormat(3, 128)
    }
    agreeing = resolve_pins(["re:.*q_proj=4", "re:.*k_proj=4"], units, sizes)
    assert {fmt.bits for fmt in agreeing.values()} == {4} and len(agreeing) == 2
    assert resolve_pins([], units, sizes) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.layers.0.mlp.dwn_proj=8"], "nearest names: model.layers.0.mlp.down_proj"),
        (["down_proj=8"], "matches none"),
        (["re:mlp.*=8"], "matches none"),
        (["re:.*q_proj=4", "re:.*k_proj=8"], "different widths"),
        (["re:.*q_proj=9"], "9 bits, widths are 2 to 8"),
        (["re:.*q_proj=1"], "1 bits, widths are 2 to 8"),
        (["re:.*q_proj=16"], "use --ignore re:.\\*q_proj"),
        (["re:.*q_proj"], "is not NAME=WIDTH"),
        (["re:.*q_proj=four"], "is not NAME=WIDTH"),
        (["re:(=4"], "not a valid regular expression"),
    ],
)
def test_bad_pins_are_usage_errors(options: list[str], message: str) -> None:
    units = [*make_block(0), *make_block(1)]
    with pytest.raises(UsageError, match=message) as caught:
        resolve_pins(options, units, {unit.name: 128 for unit in units})
    assert "\n" not in str(caught.value)


def test_resolve_ignored() -> None:
    units = [*make_block(0), *make_block(1)]
    assert resolve_ignored(["re:.*layers.0.*v_proj", "model.layers.1.mlp.down_proj"], units) == {
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert resolve_ignored([], units) == frozenset()
    with pytest.raises(UsageError, match="--ignore head matches none"):
        resolve_ignored(["head"], units)


@pytest.mark.parametrize("pattern", ["lm_head", "re:.*lm_head", "visual.fc", "re:visual"])
def test_what_is_never_quantized_may_be_ignored(pattern: str) -> None:
    assert resolve_ignored([pattern], make_block(0), ["visual.fc"]) == frozenset()


def test_units_ignored_in_part_are_named() -> None:
    units = [*make_block(0), *make_block(1)]
    (line,) = ignored_along(["model.layers.0.self_attn.q_proj", "re:.*down_proj"], units)
    assert line.startswith("--ignore names 1 of the 3 layers of model.layers.0.self_attn.qkv_proj (first ")
    assert "the other 2 stay unquantized too" in line
    assert ignored_along(["re:.*self_attn"], units) == []


def test_uniform_formats_fall_and_refuse() -> None:
    units = [make_unit("a", [(8, 256)]), make_unit("b", [(8, 192)]), make_unit("c", [(8, 256), (8, 96)], (".x", ".y"))]
    assert {n: f.label for n, f in uniform_formats(units, 3, 128).items()} == {
        "a": "w3g128",
        "b": "w3g64",
        "c": "w3g32",
    }
    odd = [*units, make_unit("d", [(8, 100)])]
    with pytest.raises(UsageError, match=r"divides d \(100 inputs\)"):
        uniform_formats(odd, 4, 128)
    assert set(uniform_formats(odd, 4, CHANNEL).values()) == {QuantFormat(4, CHANNEL)}


def test_uniform_candidates_are_distinct_and_sorted() -> None:
    units = [make_unit("a", [(8, 192)]), make_unit("b", [(16, 64)])]
    found = uniform_plans(units)
    assert len(found) == 7 * 3, "group size 128 falls to 64 everywhere and is no plan of its own"
    assert not any("g128" in label for label, _, _ in found)
    keys = [(stored, formats["a"].bits) for _, formats, stored in found]
    assert keys == sorted(keys)
    for label, formats, stored in found:
        assert stored == sum(unit.stored_bytes(formats[unit.name]) for unit in units), label
    only_channel = uniform_plans([make_unit("d", [(8, 100)])])
    assert [c.label for c in only_channel] == [f"w{bits}ch" for bits in range(2, 9)]


def test_group_sizes_beyond_the_served_ones() -> None:
    units = [make_unit("a", [(8, 576)]), make_unit("b", [(8, 1536)])]
    labels = {c.label for c in uniform_plans(units, group_sizes=(96, 192, CHANNEL))}
    assert labels == {c.label for c in uniform_plans(units)} | {f"w{b}g{g}" for b in range(2, 9) for g in (96, 192)}
    below, above = neighbours(units, found_bytes(units, 3, 96), group_sizes=[96])
    assert below is not None and below.label == "w3g96" and above is not None and above.label == "w3g64"
    assert best_uniform(units, found_bytes(units, 3, 96), group_sizes=[96]) == below
    mixed = make_unit("m", [(8, 288), (8, 256)], (".x", ".y"))
    assert uniform_formats([mixed], 3, 96) == {"m": QuantFormat(3, 32)}
    apart = make_unit("m", [(8, 48), (8, 64)], (".x", ".y"))
    with pytest.raises(UsageError, match=r"\(48, 32\) divides m.x \(48 inputs\), m.y \(64 inputs\)"):
        uniform_formats([apart], 3, 48)


def found_bytes(units: list[Unit], bits: int, group_size: int) -> int:
    formats = uniform_formats(units, bits, group_size)
    return sum(unit.stored_bytes(formats[unit.name]) for unit in units)


def test_asymmetric_plans_are_of_one_kind() -> None:
    units = [make_unit("a", [(8, 256)]), make_unit("b", [(16, 128)])]
    found = uniform_plans(units, symmetric=False)
    assert all(c.label.endswith("a") and not f.symmetric for c in found for f in c.formats.values())
    assert [c.label.removesuffix("a") for c in sorted(found)] == [c.label for c in sorted(uniform_plans(units))]
    below, above = neighbours(units, found[3].stored_bytes, symmetric=False)
    assert below is not None and above is not None and {below.label[-1], above.label[-1]} == {"a"}
    assert best_uniform(units, found[3].stored_bytes, symmetric=False) == below
    sizes = {"a": 64, "b": 128}
    assert resolve_pins(["a=6"], units, sizes, symmetric=False) == {"a": QuantFormat(6, 64, symmetric=False)}


def test_best_uniform_and_neighbours() -> None:
    units = [make_unit("a", [(128, 256)]), make_unit("b", [(64, 512)])]
    found = uniform_plans(units)
    sizes = [c.stored_bytes for c in found]
    assert best_uniform(units, sizes[0] - 1) is None
    assert neighbours(units, sizes[0] - 1) == (None, found[0])
    assert neighbours(units, sizes[-1])[1] is None
    for budget in range(sizes[0], sizes[-1] + 500, 487):
        below, above = neighbours(units, budget)
        assert below is not None and below == best_uniform(units, budget)
        assert below.stored_bytes == max(size for size in sizes if size <= budget)
        assert below.bits == max(c.bits for c in found if c.stored_bytes == below.stored_bytes)
        assert (above.stored_bytes if above else None) == min((s for s in sizes if s > budget), default=None)
