"""Shares and seeds of ranks; what goes between processes is tried in tests/cli/test_ranks.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hawqtool.errors import UsageError
from hawqtool.runtime.ranks import ALONE, Ranks, _pickled, _unpickled, owners_by_cost


@pytest.mark.parametrize(("count", "size"), [(4, 4), (7, 3), (128, 5)])
def test_shares_are_consecutive_and_even(count: int, size: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert shares[0].start == 0 and shares[-1].stop == count
    assert all(first.stop == second.start for first, second in pairwise(shares))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_fewer_rows_than_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="3 rows cannot be shared by 4 processes"):
        Ranks(0, 4).share(3)


def test_the_leader_draws_by_the_seed_itself() -> None:
    seeds = [Ranks(rank, 3).seed(5) for rank in range(3)]
    assert seeds[0] == ALONE.seed(5) == 5
    assert len(set(seeds)) == 3


def test_the_costliest_goes_first_and_loads_are_even() -> None:
    owners = owners_by_cost([1.0, 8.0, 3.0, 4.0, 2.0], 2)
    loads = [sum(cost for cost, owner in zip([1, 8, 3, 4, 2], owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert loads == [9, 9]
    assert owners[1] == 0


def test_equal_costs_alternate() -> None:
    assert owners_by_cost([5.0] * 4, 2) == [0, 1, 0, 1]
    assert owners_by_cost([], 3) == []


def test_one_process_exchanges_nothing() -> None:
    value = object()
    assert ALONE.from_owner(value, 0) is value
    assert ALONE.to_owner(value, 0) == [value]
    assert ALONE.everywhere(value) == [value]


@pytest.mark.parametrize(("size", "count", "teams"), [(3, 2, [0, 1, None]), (4, 4, [0, 1, 2, 3])])
def test_ranks_part_in_teams_of_equal_size_and_some_are_left_over(
    size: int, count: int, teams: list[int | None]
) -> None:
    found = [Ranks(rank, size).teams(count) for rank in range(size)]
    assert [number if team else None for number, team in found] == teams
    assert all(team.size == 1 and team.leads for _, team in found if team)


def test_tensors_travel_apart_from_what_holds_them() -> None:
    value = {"rows": [torch.arange(6).view(2, 3).t(), torch.zeros(0)], "name": "x", "half": torch.ones(2).bfloat16()}
    data, tensors = _pickled(value)
    waiting = iter(tensors)
    found = _unpickled(data, lambda tensor: tensor.copy_(next(waiting)))
    assert found["name"] == "x"
    assert torch.equal(found["rows"][0], value["rows"][0])  # type: ignore[index]
    assert found["rows"][1].shape == (0,) and found["half"].dtype == torch.bfloat16
