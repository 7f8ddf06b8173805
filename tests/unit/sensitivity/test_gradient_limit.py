"""Rows whose gradients grow far beyond the others' are shortened; the others stay as they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hawqtool.sensitivity.gradient_limit import GradientLimit

POSITIONS, WIDTH = 5, 8


def gradients(norms: list[float], batch_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(len(norms), POSITIONS, WIDTH, generator=generator)
    rows *= (torch.tensor(norms) / rows.flatten(1).norm(dim=1))[:, None, None]
    return list(rows.split(batch_size))


def norms(parts: list[Tensor]) -> list[float]:
    return torch.cat(parts).flatten(1).norm(dim=1).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_row_that_grows_beyond_the_limit_is_shortened_to_it(batch_size: int) -> None:
    growth = GradientLimit.of(gradients([1.0] * 5, batch_size), limit=4.0)
    before = gradients([1.0, 2.0, 3.0, 1.5, 40.0], batch_size)
    after = growth.limited(before)
    assert norms(after) == pytest.approx([1.0, 2.0, 3.0, 1.5, 4.0])  # the median of ‖g‖² grew to 4
    assert growth.shortened == 1
    assert growth.share.tolist() == pytest.approx([1, 1, 1, 1, 0.1])
    cosine = torch.nn.functional.cosine_similarity(torch.cat(before).flatten(1), torch.cat(after).flatten(1))
    assert cosine.tolist() == pytest.approx([1.0] * 5)
    for old, new in list(zip(before, after, strict=True))[: 4 // batch_size]:
        assert torch.equal(old, new)


def test_a_row_that_begins_large_is_not_shortened() -> None:
    growth = GradientLimit.of(gradients([1.0, 100.0, 2.0], 3))
    assert norms(growth.limited(gradients([2.0, 200.0, 4.0], 3))) == pytest.approx([2.0, 200.0, 4.0])
    assert growth.shortened == 0


def test_shares_multiply_from_block_to_block() -> None:
    growth = GradientLimit.of(gradients([1.0, 1.0, 1.0], 3), limit=1.0)
    growth.limited(gradients([1.0, 1.0, 2.0], 3))
    growth.limited(gradients([1.0, 1.0, 5.0], 3))
    assert growth.share.tolist() == pytest.approx([1, 1, 0.1])


def test_one_row_and_no_limit_change_nothing() -> None:
    single = GradientLimit.of(gradients([1.0], 1))
    assert norms(single.limited(gradients([50.0], 1))) == pytest.approx([50.0])
    unlimited = GradientLimit.of(gradients([1.0] * 4, 2), limit=math.inf)
    assert norms(unlimited.limited(gradients([1.0, 1.0, 1.0, 9.0], 2))) == pytest.approx([1.0, 1.0, 1.0, 9.0])


def test_gradients_that_vanish_stay_zero() -> None:
    growth = GradientLimit.of(gradients([0.0, 1.0], 2))
    after = growth.limited(gradients([0.0, 1.0], 2))
    assert not any(part.isnan().any() for part in after)
    assert norms(after) == pytest.approx([0.0, 1.0])
