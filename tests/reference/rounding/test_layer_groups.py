"""Groups of one form that are rounded together: the same as one by one, to the bit; their factors against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.records import LinearSpec
from hawqtool.rounding import grid
from hawqtool.rounding import spec as rounding_spec
from hawqtool.rounding.factor import factorize, factorize_stacked
from hawqtool.rounding.gram import gram
from hawqtool.rounding.layer import round_group, round_groups, round_layer_groups, round_layers
from hawqtool.rounding.method import RoundingMethod, Task, TaskGroup
from hawqtool.rounding.spec import RoundingSpec
from hawqtool.rounding.statistics import GroupStatistics, second_moments

FORMATS = [QuantFormat(4, 32), QuantFormat(3, 16, symmetric=False), QuantFormat(8, CHANNEL)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def groups_of_experts(count: int, outputs: Sequence[int], width: int) -> list[TaskGroup]:
    """Groups of so many layers with one input, each in all formats; the last group has fewer outputs."""
    found = []
    for number in range(count):
        x = random(60, width, seed=number) * torch.linspace(0.1, 2, width)
        statistics, tasks = second_moments(x, len(x)), []
        for index, rows in enumerate(outputs):
            weight = random(rows - (number == count - 1), width, seed=100 * number + index)
            tasks += [Task(f"{number}.{index}", weight, fmt, torch.bfloat16) for fmt in FORMATS]
        found.append(TaskGroup(tasks, factorize(statistics.gram, len(x)), statistics))
    return found


@pytest.mark.parametrize("method", ["rtn", "gptq", "foem"])
@pytest.mark.parametrize("elements", [grid._CHUNK_ELEMENTS, 3 * 24 * 64])
def test_groups_together_are_the_groups_one_by_one(method: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_CHUNK_ELEMENTS", elements)
    groups, rounding = groups_of_experts(5, (24, 24, 16), 64), RoundingMethod(method)
    for group, found in zip(groups, round_groups(groups, rounding), strict=True):
        for one, alone in zip(found, round_group(*group[:2], rounding, group.statistics), strict=True):
            assert torch.equal(one.codes, alone.codes)
            assert torch.equal(one.scales, alone.scales)
            assert (one.zeros is None) == (alone.zeros is None)
            assert one.zeros is None or torch.equal(one.zeros, alone.zeros)  # type: ignore[arg-type]


def test_their_metrics_are_those_of_each() -> None:
    groups, rounding = groups_of_experts(3, (24, 16), 64), RoundingMethod()
    for group, layers in zip(groups, round_layer_groups(groups, rounding), strict=True):
        assert group.statistics is not None
        alone = round_layers(group.tasks, group.statistics, group.factor, rounding)
        for one, other in zip(layers, alone, strict=True):
            assert (one.name, one.quant_format) == (other.name, other.quant_format)
            assert one.metrics.output_error == other.metrics.output_error
            assert one.metrics.predicted_error == other.metrics.predicted_error


@pytest.mark.parametrize("width", [1, 128, 300])
def test_stacked_factors_are_the_inverse_of_each_matrix(width: int) -> None:
    inputs = [random(3 * width, width, seed=seed) for seed in range(4)]
    inputs[1][:, width // 2] = 0.0
    grams = [gram(x) for x in inputs]
    grams[2] = torch.zeros(width, width)
    tokens = [3 * width, 3 * width, 3 * width, 8 * width]
    for factor, matrix, count in zip(factorize_stacked(grams, tokens, None, list("abcd")), grams, tokens, strict=True):
        alone = factorize(matrix, count)
        assert torch.equal(factor.order, alone.order)
        assert torch.equal(factor.diagonal, alone.diagonal)
        assert (factor.damping, factor.retries) == (alone.damping, alone.retries)
        assert (factor.dead_inputs, factor.num_tokens) == (alone.dead_inputs, alone.num_tokens)
        damped = matrix.double().clone()
        damped.diagonal().add_(factor.damping * (float(matrix.diagonal().double().mean()) or 1.0))
        upper, ordered = factor.upper.double(), damped[factor.order][:, factor.order]
        torch.testing.assert_close(upper.T @ upper @ ordered, torch.eye(width).double(), rtol=0, atol=2e-5)
        torch.testing.assert_close(factor.pivots, alone.pivots, rtol=1e-5, atol=0)


def test_a_stacked_matrix_that_fails_is_damped_more_or_named() -> None:
    good, indefinite = gram(random(100, 8, seed=0)), torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    first, second = factorize_stacked([good, indefinite], [100, 100], 0.01, ["a", "b"])
    assert first.retries == 0
    assert second.retries > 0
    assert torch.equal(second.upper, factorize(indefinite, 100, 0.01).upper)
    with pytest.raises(NumericalError, match="inputs of b overflow"):
        factorize_stacked([good, good * math.inf], [100, 100], None, ["a", "b"])


def test_experts_of_one_form_go_together_as_far_as_memory_is_meant_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(name: str, outputs: int) -> LinearSpec:
        return LinearSpec(name, outputs, 64, 0, "u", 2)

    roles = ("up_proj", 32), ("down_proj", 16)
    experts = [linear(f"m.experts.{n}.{role}", outputs) for n in range(5) for role, outputs in roles]
    groups = [((one,), GroupStatistics(torch.eye(64), 1, 1)) for one in (*experts, linear("m.q_proj", 32))]
    rounding = RoundingSpec.of_plan(RoundingMethod(), {"u": FORMATS[0]}, {})
    monkeypatch.setitem(rounding_spec._ALIKE_BYTES, "cpu", 2 * (28 * 64**2 + 5 * 32 * 64))
    parts = [[group[0].name for group, _ in part] for part in rounding.parts(groups)]
    assert sorted(sum(parts, [])) == sorted(group[0].name for group, _ in groups)
    assert ["m.q_proj"] in parts
    assert [len(part) for part in parts if part[0].endswith("up_proj")] == [2, 2, 1]
    assert [len(part) for part in parts if part[0].endswith("down_proj")] == [2, 2, 1]
