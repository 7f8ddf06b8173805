"""Learning from the Gram matrix: gradient in float64, what is chosen on held-out tokens, coordinate descent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hawqtool.formats import QuantFormat, parse_label
from hawqtool.records import LayerMetrics, RoundedLayer
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.layer import round_layers
from hawqtool.rounding.learned import gram_matrix
from hawqtool.rounding.learned.coordinate_descent import descend, move_codes
from hawqtool.rounding.learned.gram_matrix import GramSchedule, half_gradient, learn_group
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics, second_moments

TOKENS, COLUMNS, ROWS = 2048, 64, 24
FORMAT = QuantFormat(3, 32)
SCHEDULE = GramSchedule(60, seed=1)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int = 1) -> Tensor:
    """Correlated inputs ``[tokens, columns]``."""
    return random(TOKENS, COLUMNS, seed=seed) @ (torch.eye(COLUMNS) + 0.3 * random(COLUMNS, COLUMNS, seed=2))


def statistics(x: Tensor, original: Tensor | None = None) -> GroupStatistics:
    return second_moments(x, len(x), torch.arange(len(x)) // 16 % 4 == 3, original)


def rounded_group(
    given: GroupStatistics, fmt: QuantFormat, schedule: GramSchedule = SCHEDULE, method: RoundingMethod | None = None
) -> tuple[list[Task], list[RoundedLayer], list[RoundedLayer]]:
    """Two layers, as they are rounded, and as they are learned."""
    method = method or RoundingMethod()
    tasks = [Task(n, random(ROWS, COLUMNS, seed=s), fmt, torch.bfloat16) for n, s in (("q", 3), ("k", 4))]
    factor = factorize(given.gram, given.num_tokens)
    layers = round_layers(tasks, given, factor, method)
    return tasks, layers, learn_group(tasks, layers, given, factor, method, schedule)


def loss(layer: RoundedLayer, goal: Tensor, gram: Tensor) -> float:
    error = dequantize(layer.codes, layer.scales, layer.zeros).double() - goal.double()
    return float(((error @ gram.double()) * error).sum())


def test_the_gradient_is_that_of_the_loss_in_float64() -> None:
    gram, goal = statistics(inputs()).gram, random(ROWS, COLUMNS, seed=3)
    weight = (goal + 0.1 * random(ROWS, COLUMNS, seed=5)).double().requires_grad_()
    error = weight - goal.double()
    ((error @ gram.double()) * error).sum().backward()
    found = half_gradient(weight.detach().float(), goal, gram)
    assert weight.grad is not None
    torch.testing.assert_close(2 * found.double(), weight.grad, rtol=0, atol=1e-5 * float(weight.grad.abs().max()))


@pytest.mark.parametrize("label", ["w3g32", "w2g64", "w3g32a"])
def test_layers_come_closer_to_the_original_on_tokens_that_nothing_saw(label: str) -> None:
    fmt = parse_label(label)
    given, unseen = statistics(inputs()), statistics(inputs(seed=9)).gram
    tasks, before, after = rounded_group(given, fmt)
    for task, old, new in zip(tasks, before, after, strict=True):
        assert new.metrics.gram_gain is not None and new.metrics.gram_gain > 0.03
        assert loss(new, task.weight, unseen) < 0.97 * loss(old, task.weight, unseen)
        assert int(new.codes.min()) >= fmt.min_code and int(new.codes.max()) <= fmt.max_code
        power = float(((task.weight.double() @ given.gram.double()) * task.weight.double()).sum())
        assert new.metrics.output_error == pytest.approx(loss(new, task.weight, given.gram) / power, rel=1e-4)
    again = rounded_group(given, fmt)[2]
    for found, other in zip(after, again, strict=True):
        assert torch.equal(found.codes, other.codes) and torch.equal(found.scales, other.scales)


def test_the_goal_is_the_shifted_target() -> None:
    """With all of the shift the weights whose outputs are learned are those of the original's inputs."""
    x = inputs()
    original = x + 0.2 * inputs(seed=6)
    given = statistics(x, original)
    tasks, before, after = rounded_group(given, FORMAT, method=RoundingMethod(shift=1.0))

    def output_error(layer: RoundedLayer, task: Task) -> float:
        rounded = dequantize(layer.codes, layer.scales).double()
        return float((x.double() @ rounded.t() - original.double() @ task.weight.double().t()).square().sum())

    for task, old, new in zip(tasks, before, after, strict=True):
        assert output_error(new, task) < output_error(old, task)


def test_layers_stay_where_held_out_tokens_gain_nothing_or_rows_lower_another_loss() -> None:
    x = inputs()
    x[torch.arange(len(x)) // 16 % 4 == 3] = inputs(seed=8)[:512] @ torch.diag(10 * random(COLUMNS, seed=7))
    given = statistics(x)
    _, before, after = rounded_group(given, FORMAT)
    worse = [new.metrics.gram_gain == 0 for new in after]
    assert any(worse) and all(new.codes is old.codes for new, old, w in zip(after, before, worse, strict=True) if w)

    given = statistics(inputs())
    tasks, before, _ = rounded_group(given, FORMAT)
    fed = [replace(layer, metrics=replace(layer.metrics, feedback_blocks=16)) for layer in before]
    factor = factorize(given.gram, given.num_tokens)
    first, second = learn_group(tasks, [fed[0], before[1]], given, factor, RoundingMethod(), SCHEDULE)
    assert first is fed[0] and second.metrics.gram_gain
    alone = replace(given, held_out=None)
    assert learn_group(tasks, before, alone, factor, RoundingMethod(), SCHEDULE) == before


def test_descent_ends_where_no_move_by_one_helps() -> None:
    """Against all single moves of every code, in float64."""
    gram = statistics(inputs()).gram + 0.1 * torch.eye(COLUMNS)
    goal = random(6, COLUMNS, seed=3)
    scales = (goal.view(6, 2, 32).abs().amax(-1) / 4).bfloat16() * torch.tensor([1, -1])
    start = Quantized(torch.zeros(6, COLUMNS, dtype=torch.int8), scales, None)
    found = start
    for _ in range(40):  # a turn moves a part of the codes
        found = move_codes(found, FORMAT, goal, gram)

    def losses(codes: Tensor) -> Tensor:
        error = dequantize(codes, scales.double()) - goal.double()
        return ((error @ gram.double()) * error).sum(1)

    reached = losses(found.codes)
    for column in range(COLUMNS):
        for move in (-1, 1):
            codes = found.codes.clone()
            codes[:, column] += move
            inside = (codes[:, column] >= -4) & (codes[:, column] <= 3)
            assert bool((losses(codes)[inside] >= reached[inside] * (1 - 1e-5)).all())
    damped = descend(start, FORMAT, goal, gram)
    assert damped.scales.dtype == torch.bfloat16 and torch.equal(damped.scales.sign(), scales.sign())


def test_what_was_learned_stops_at_the_check_that_was_best(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = {name: gram_matrix.Stop(3, False, 0.1) for name in ("q", "k")}
    monkeypatch.setattr(gram_matrix, "choose_stops", lambda *_: stops)
    given = statistics(inputs())
    tasks, before, after = rounded_group(given, FORMAT)
    initial = [
        gram_matrix.InitialRounding(t.name, t.weight, gram_matrix.quantized(layer), FORMAT)
        for t, layer in zip(tasks, before, strict=True)
    ]
    damped = gram_matrix._damped(given.gram, factorize(given.gram, given.num_tokens))
    checks = dict(gram_matrix.annealed(initial, damped, SCHEDULE))
    assert list(checks) == list(range(1, 11))
    assert all(torch.equal(layer.codes, checks[3][layer.name].codes) for layer in after)
    assert not torch.equal(checks[3]["q"].codes, checks[10]["q"].codes)
    assert isinstance(before[0].metrics, LayerMetrics)
