"""The menu of formats: what engines load near the budget by default, else what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from hawqtool.config import RunConfig
from hawqtool.formats import parse_label
from hawqtool.pipeline.run.menu import format_menu, measured_menu, widths, within_second_budget
from hawqtool.records import BitPlan, LinearSpec, Score, Unit


def unit(name: str, inputs: int) -> Unit:
    return Unit(name, (LinearSpec(name, 64, inputs, 0, name, 2),))


WIDE, NARROW = unit("layers.0.down_proj", 1536), unit("layers.0.o_proj", 576)
EXPERT = unit("layers.0.mlp.experts.0.up_proj", 1536)


def labels(found: Unit = WIDE, bpw: float | None = None, **values: Any) -> list[str]:
    config = RunConfig(model="m", **values)
    budget = None if bpw is None else int(bpw * found.num_weights / 8)
    bits = widths(config, [found], budget)
    return [fmt.label for fmt in format_menu([found], bits, config, bpw)[found.name]]


@pytest.mark.parametrize(
    ("bpw", "expected"),
    [
        (2.5, "w2g128 w2g64 w2g32 w2ch w3g128 w3g64 w3g32 w3ch w4ch w8ch"),
        (3.25, "w2g64 w2g32 w3g128 w3g64 w3g32 w3ch w4g128 w4g64 w4g32 w4ch w8ch"),
        (4.5, "w4g128 w4g64 w4g32 w4ch w8ch"),
        (None, "w2g128 w2g64 w2g32 w2ch w3g128 w3g64 w3g32 w3ch w4g128 w4g64 w4g32 w4ch w8ch"),
    ],
)
def test_by_default_groups_near_the_budget_are_chosen_from(bpw: float | None, expected: str) -> None:
    assert labels(bpw=bpw) == expected.split()


def test_transformers_has_the_widths_between_where_the_budget_allows_them() -> None:
    fine = "w4g32 w5g128 w5g64 w5g32 w5ch w6g128 w6g64 w6g32 w6ch w8ch"
    assert labels(bpw=5.4, profile="transformers") == fine.split()
    assert labels(bpw=5.0, profile="transformers") == labels(bpw=5.0) == ["w4g128", "w4g64", "w4g32", "w4ch", "w8ch"]


def test_groups_fall_to_what_divides_and_are_listed_once() -> None:
    assert labels(NARROW, 3.25, bits="3", target_bpw=3.25) == ["w3g64", "w3g32", "w3ch"]


def test_experts_have_groups_where_no_engine_loads_whole_rows() -> None:
    assert labels(EXPERT, 2.5) == ["w2g128", "w2g64", "w2g32", "w3g128", "w3g64", "w3g32", "w4ch", "w8ch"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"group_size": 64}, "w2g64 w3g64 w4g64 w8g64"),
        ({"group_size": "channel", "bits": "3,4"}, "w3ch w4ch"),
        ({"extra_group_sizes": "32", "bits": "3"}, "w3g128 w3g32"),
        ({"bits": "4"}, "w4g128"),
        ({"formats": "w3g64,w4g128,w8ch"}, "w3g64 w4g128 w8ch"),
        ({"formats": "w4g32,w4,w2ch"}, "w2ch w4g32 w4g128 w4g64 w4ch"),
        ({"formats": "w3g64a", "symmetric": False, "profile": "vllm"}, "w3g64a"),
        ({"formats": ["w2g48"], "profile": "transformers"}, "w2g48"),
    ],
)
def test_what_is_asked_for_is_the_menu(values: dict[str, Any], expected: str) -> None:
    assert labels(bpw=None if "bits" in values else 3.25, **values) == expected.split()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"formats": "w3q64"}, "did you mean 'w3g64'?"),
        ({"formats": "w9g64"}, "is not a format label"),
        ({"formats": "w3g40"}, "no multiple of 16"),
        ({"formats": "w3g48"}, "groups of 48 load in transformers alone"),
        ({"formats": "w3g64", "bits": "3"}, "formats is the whole menu, found bits too"),
        ({"formats": "w3g64", "group_size": 64}, "formats is the whole menu, found group_size too"),
        ({"formats": "w3g64a"}, "w3g64a in formats has zero points; give --asymmetric"),
        ({"formats": "w3", "profile": "portable"}, "profile portable allows widths 4 and 8 only"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RunConfig(model="m", **values)
    assert message in str(caught.value)


def test_a_file_of_scores_gives_the_formats_that_it_has() -> None:
    scores = {WIDE.name: {label: Score(1.0, 0.0) for label in ("w4g32", "w3g64", "w3ch", "w8g64")}}
    found = measured_menu([WIDE], (3, 4), scores)
    assert [fmt.label for fmt in found[WIDE.name]] == ["w3ch", "w3g64", "w4g32"]


def test_a_plan_from_elsewhere_says_what_it_costs_beside_its_bytes() -> None:
    fmt = parse_label("w4g128")
    plan, price = (
        BitPlan({WIDE.name: fmt}, WIDE.stored_bytes(fmt), WIDE.num_weights),
        1e6 * WIDE.stored_bytes(fmt) / 3.35e12,
    )
    for limit, allowed in ((2 * price, True), (price / 2, False)):
        config = RunConfig(model="m", target_bpw=5.0, costs="hopper:1", max_cost=limit)
        found = within_second_budget(config, [WIDE], plan)
        assert (found is not None) is allowed
        assert found is None or (found.cost, found.max_cost) == (pytest.approx(price), limit)
    assert within_second_budget(RunConfig(model="m", target_bpw=5.0), [WIDE], plan) is plan
