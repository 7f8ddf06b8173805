"""Rows of a layer that several ranks round together, against one process that rounds all of them."""

from __future__ import annotations

import pytest
import torch

from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.records import RoundedLayer
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.layer import round_layer_groups
from hawqtool.rounding.method import RoundingMethod, Task, TaskGroup
from hawqtool.rounding.statistics import second_moments
from hawqtool.runtime.ranks import Ranks
from hawqtool.streaming.dealt import rounded_by_rows
from tests.support.crew import by_crew

RANKS, ROWS, WIDTH = 3, 50, 64
"""Rows that three ranks cannot share alike."""


def group_of_one(at_outputs: bool, fmt: QuantFormat) -> TaskGroup:
    """A layer whose inputs drifted from the original's, told at its inputs or at its outputs."""
    made = torch.Generator().manual_seed(3)
    weight, original = torch.randn(ROWS, WIDTH, generator=made), torch.randn(400, WIDTH, generator=made)
    x, importance = original + 0.1 * torch.randn(400, WIDTH, generator=made), torch.rand(400, generator=made)
    statistics = second_moments(x, 400, None, original, importance, weight if at_outputs else None)
    factor = factorize(statistics.gram, 400, None, name="layer")
    return TaskGroup([Task("layer", weight, fmt, torch.float32)], factor, statistics)


@pytest.mark.parametrize("at_outputs", [False, True])
@pytest.mark.parametrize("fmt", [QuantFormat(3, 32), QuantFormat(4, CHANNEL), QuantFormat(4, 32, symmetric=False)])
def test_rows_shared_by_ranks_are_those_of_one_process(at_outputs: bool, fmt: QuantFormat) -> None:
    group, method = group_of_one(at_outputs, fmt), RoundingMethod("gptq", shift=0.5)

    def rounded(own: TaskGroup) -> list[RoundedLayer]:
        return round_layer_groups([own], method)[0]

    (expected,) = rounded(group)
    for (found,) in by_crew(RANKS, lambda ranks: rounded_by_rows(ranks, group, rounded)):
        # Products of fewer rows are summed in another order, so that a value between two codes may fall to either.
        assert float((found.codes == expected.codes).double().mean()) > 0.99
        torch.testing.assert_close(found.scales, expected.scales, rtol=1e-4, atol=1e-6)
        assert (found.zeros is None) == (expected.zeros is None)
        for key in ("output_error", "rtn_error", "predicted_error", "weight_error"):
            assert getattr(found.metrics, key) == pytest.approx(getattr(expected.metrics, key), rel=1e-2), key
        assert found.metrics.clip_rate == pytest.approx(expected.metrics.clip_rate, abs=2e-3)


def test_rows_that_weigh_nothing_have_metrics_all_the_same() -> None:
    (task,), factor, statistics = group_of_one(False, QuantFormat(4, 32))
    dead = TaskGroup(
        [Task("layer", torch.zeros_like(task.weight), task.quant_format, torch.float32)], factor, statistics
    )
    ranks = Ranks()
    (found,) = rounded_by_rows(ranks, dead, lambda own: round_layer_groups([own], RoundingMethod("gptq"))[0])
    assert found.metrics.output_error == 0 and found.metrics.weight_error == 0
