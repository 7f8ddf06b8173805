"""Sets of rows from several weighted sources, and the settings that name them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hawqtool.config import RunConfig, load_config
from hawqtool.data.mixing import SourceRows, mix_rows, pieces, quotas, scoring_rows, shares
from hawqtool.errors import InputError, UsageError

COUNTS = {"calibration": 12, "scoring": 8, "selection": 8, "report": 4}


def numbered(label: str, first: int, count: int, quota: dict[str, int]) -> SourceRows:
    """Rows that hold nothing but their own number."""
    return SourceRows(label, torch.arange(first, first + count).view(-1, 1).repeat(1, 8), quota)


def two_to_one(rows: int = 100) -> list[SourceRows]:
    first, second = quotas(COUNTS, [2, 1])
    return [numbered("a", 0, rows, first), numbered("b", 1000, rows, second)]


@pytest.mark.parametrize(
    ("count", "weights", "expected"),
    [
        (9, [2, 1], [6, 3]),
        (8, [2, 1], [5, 3]),
        (8, [1, 1, 1], [3, 3, 2]),
        (1, [1, 1], [1, 0]),
        (8, [0.5], [8]),
        (10, [0.1, 0.2, 0.7], [1, 2, 7]),
        (8, [1000, 1], [8, 0]),
    ],
)
def test_shares_by_largest_remainder(count: int, weights: list[float], expected: list[int]) -> None:
    assert shares(count, weights) == expected


def test_every_set_has_the_proportion() -> None:
    sets = mix_rows(two_to_one())
    for name, expected in {"calibration": (8, 4), "scoring": (5, 3), "selection": (5, 3), "report": (3, 1)}.items():
        second = int((sets[name].tokens[:, 0] >= 1000).sum())
        assert (len(sets[name].tokens) - second, second) == expected
        assert sets[name].source == f"a ({expected[0]} rows), b ({expected[1]} rows)"


def test_sources_are_interleaved_in_their_order() -> None:
    sets = mix_rows(two_to_one())
    assert sets["calibration"].tokens[:, 0].tolist() == [0, 1000, 1, 2, 1001, 3, 4, 1002, 5, 6, 1003, 7]
    assert sets["scoring"].tokens[:, 0].tolist()[:2] == [8, 1004]
    assert mix_rows(two_to_one())["report"].fingerprint == sets["report"].fingerprint


def test_no_row_is_given_twice() -> None:
    given = torch.cat([rows.tokens[:, 0] for rows in mix_rows(two_to_one()).values()])
    assert len(given) == len(given.unique()) == sum(COUNTS.values())


def test_one_source_keeps_its_order_and_label() -> None:
    sets = mix_rows([numbered("a", 0, 40, quotas(COUNTS, [3])[0])])
    assert torch.cat([rows.tokens[:, 0] for rows in sets.values()]).tolist() == list(range(32))
    assert {rows.source for rows in sets.values()} == {"a"}


def test_pieces_of_long_rows_begin_as_these_do() -> None:
    rows = torch.arange(40).view(4, 10)
    assert pieces(rows, 6, 5, []).tolist() == [
        *(list(range(first, first + 5)) for first in (0, 10, 20, 30)),
        *(list(range(first, first + 5)) for first in (5, 15)),
    ]
    rows[:, 0] = 99
    assert pieces(rows, 5, 5, [99])[3:].tolist() == [[99, 31, 32, 33, 34], [99, 5, 6, 7, 8]]
    assert len(pieces(rows, 99, 5, [99])) == 8, "nine tokens hold two bodies of four"


def test_every_source_that_is_short_is_counted() -> None:
    with pytest.raises(InputError) as caught:
        mix_rows(two_to_one(rows=10))
    assert str(caught.value) == (
        "a holds 10 rows of 8 tokens, 21 are needed (8 calibration, 5 scoring, 5 selection, 3 report); "
        "b holds 10 rows of 8 tokens, 11 are needed (4 calibration, 3 scoring, 3 selection, 1 report); "
        "give more, or lower --num-samples or --seq-len"
    )


# Settings.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("self", {"self": 1}),
        ("a.txt=2", {"a.txt": 2}),
        (["a=b.txt", "b.txt=0.5", "owner/name::test@main=3"], {"a=b.txt": 1, "b.txt": 0.5, "owner/name::test@main": 3}),
        (["a=2=1"], {"a=2": 1}),
    ],
)
def test_weights_stand_behind_sources(given: Any, expected: dict[str, float]) -> None:
    assert RunConfig(model="m", calibration=given).calibration_weights == expected


@pytest.mark.parametrize(
    ("key", "given", "said"),
    [
        ("calibration", "a.txt=0", "expected weights above 0"),
        ("calibration", ["a.txt", "b.txt=-1"], "expected weights above 0"),
        ("calibration", ["a.txt", "a.txt=2"], "given twice"),
        ("calibration", "=2", "expected a source"),
        ("calibration", [], "expected a source"),
        ("eval_data", "self", "expected text that the model did not write"),
    ],
)
def test_wrong_sources_say_what_is_expected(key: str, given: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, {"model": "m", key: given})
    assert key in str(caught.value) and said in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("num_samples", "length", "device", "expected"),
    [(128, 2048, "cuda", 32), (128, 2048, "cpu", 8), (16, 256, "cuda", 16), (512, None, "cpu", 32)],
)
def test_a_gpu_scores_on_a_quarter(num_samples: int, length: int | None, device: str, expected: int) -> None:
    assert scoring_rows(num_samples, length, device) == expected
