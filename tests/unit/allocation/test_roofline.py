"""Costs by a roofline: reading or multiplying, whichever takes longer, on the hardware of the name."""

from __future__ import annotations

import pytest

from hawqtool.allocation.roofline import RooflineCosts, names_hardware
from hawqtool.allocation.second_cost import second_cost
from hawqtool.errors import UsageError
from hawqtool.formats import parse_label
from hawqtool.records import LinearSpec, Unit

LABELS = ("w4g128", "nvfp4", "fp8-a8f", "16")
ROWS, COLUMNS = 1024, 4096
UNIT = Unit("layers.0.o", (LinearSpec("layers.0.o", ROWS, COLUMNS, 0, "layers.0.o", 2),))


def costs(text: str, unit: Unit = UNIT, labels: tuple[str, ...] = LABELS) -> dict[str, float]:
    menu = {unit.name: tuple(map(parse_label, labels))}
    return {fmt.label: cost for fmt, cost in RooflineCosts(text).of_menu([unit], menu)[unit.name].items()}


def test_one_token_waits_for_memory_and_many_for_arithmetic() -> None:
    weights = ROWS * COLUMNS
    found = costs("hopper:1")
    assert found["nvfp4"] == pytest.approx((weights / 2 + weights / 16 + 4) / 3.35e12 * 1e6)
    assert found["w4g128"] < found["nvfp4"] < found["fp8-a8f"] < found["16"] == pytest.approx(2e6 * weights / 3.35e12)
    found = costs("hopper:2048")
    assert found["fp8-a8f"] == pytest.approx(2e6 * 2048 * weights / 1979e12)
    assert found["w4g128"] == found["nvfp4"] == found["16"] == pytest.approx(2e6 * 2048 * weights / 989e12)


def test_four_bits_are_faster_below_150_tokens_on_hopper_alone() -> None:
    """Where both are even: 2 M / 989e12 = (1 + 2 / columns) / 3.35e12, M = 148."""
    for tokens, fewer in ((147, True), (149, False)):
        found = costs(f"hopper:{tokens}")
        assert (found["nvfp4"] < found["fp8-a8f"]) is fewer
    both = costs("blackwell:4096", labels=("nvfp4-a4", "nvfp4", "fp8-a8f", "mxfp4"))
    assert 4 * both["nvfp4-a4"] == pytest.approx(2 * both["fp8-a8f"]) == pytest.approx(both["nvfp4"])
    assert both["mxfp4"] == both["nvfp4-a4"], "its kernel rounds inputs whatever the label says"


def test_routed_experts_count_by_what_a_step_reaches() -> None:
    """A token reads an eighth: a step of two reads 1 - (7/8)², and multiplies a quarter of all."""
    some = Unit("experts", UNIT.members, 0.125)
    for tokens, reached in ((1, 0.125), (2, 1 - 0.875**2)):
        assert costs(f"hopper:{tokens}", some)["16"] == pytest.approx(reached * costs("hopper:1")["16"])
    assert costs("hopper:65536", some)["16"] == pytest.approx(0.125 * costs("hopper:65536")["16"])


def test_what_does_not_run_and_what_is_no_hardware() -> None:
    with pytest.raises(UsageError, match="w8ch-a8i does not run there; .*ampere, ada, hopper has kernels"):
        costs("blackwell:8", labels=("w8ch-a8i",))
    for text in ("hopper", "hopper:", "hopper:0", "hopper:x", "hopper:1.5", f"hopper:{1 << 21}", "hopper:²"):
        assert names_hardware(text)
        with pytest.raises(UsageError, match="give such as hopper:64"):
            second_cost(text, 1.0, [UNIT], {UNIT.name: (parse_label("nvfp4"),)}, {})
    assert not names_hardware("costs.csv") and not names_hardware(None)
