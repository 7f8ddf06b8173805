"""What the configuration leaves open is resolved by device and model, once."""

from __future__ import annotations

from typing import Any

import pytest

from hawqtool.config import SETTINGS, RunConfig
from hawqtool.pipeline.run.resolved import ResolvedSettings, resolve_settings


def resolved(device_type: str = "cpu", longest: int | None = None, **values: Any) -> ResolvedSettings:
    return resolve_settings(RunConfig(model="m", **values), device_type, longest)


@pytest.mark.parametrize(("device", "expected"), [("cpu", (16, 256, 32, 2, 0)), ("cuda", (128, 2048, 64, 2, 0))])
def test_defaults_are_those_that_the_help_names(device: str, expected: tuple[int, ...]) -> None:
    found = resolved(device)
    names = ("num_samples", "seq_len", "selection_samples", "shortlist", "swaps")
    assert tuple(getattr(found, name) for name in names) == expected
    for name in names:
        by_device = SETTINGS[name].by_device
        assert by_device is not None and getattr(found, name) == by_device.on(device)


def test_what_is_given_wins_and_the_model_bounds_the_default_length() -> None:
    found = resolved(num_samples=3, seq_len=8, shortlist=1, swaps=1, batch_size=5, longest=100)
    assert (found.num_samples, found.seq_len, found.shortlist, found.swaps, found.batch_size) == (3, 8, 1, 1, 5)
    assert resolved(longest=100).seq_len == 100 and resolved(longest=1000).seq_len == 256
    assert resolved(swaps=0, device_type="cuda").swaps == 0 and resolved().batch_size == 0


def test_quality_targets_and_second_budgets_have_no_swaps_and_no_plans_of_other_metrics() -> None:
    assert resolved("cuda", target_kl=0.1).swaps == 0
    found = resolved("cuda", costs="c.csv", max_cost=1.0)
    assert (found.shortlist, found.swaps) == (2, 0)


def test_without_evaluation_there_is_nothing_to_compare() -> None:
    assert resolved(eval=False).shortlist == 1


def test_metric_method_and_token_importance_follow_the_rounding() -> None:
    assert resolved().metric == "projection" and resolved(rounding="rtn").metric == "fisher"
    assert resolved(rounding="gptaq", gptaq_alpha=0.5).method.needs_drift
    found = {name: resolved(rounding=name).uses_token_importance for name in ("rtn", "gptq", "foem", "gptaq")}
    assert found == {"rtn": False, "gptq": True, "foem": True, "gptaq": True}
    assert resolved(rounding="rtn", token_importance="gradient").uses_token_importance
    assert not resolved(token_importance="none").uses_token_importance


def test_targets_are_shifted_by_half_where_the_rounding_and_the_model_allow_it() -> None:
    def shift(has_experts: bool = False, **values: Any) -> float | str:
        return resolve_settings(RunConfig(model="m", **values), "cpu", None, has_experts).method.shift

    assert shift() == shift(rounding="foem") == 0.5
    assert shift(has_experts=True) == shift(rounding="rtn") == shift(rounding="gptaq") == 0.0
    assert shift(target_shift="off") == 0.0 and shift(target_shift="auto") == "auto"
    assert shift(True, target_shift=0.25) == 0.25  # asked for: refused with the model, not dropped


def test_output_feedback_is_on_where_it_was_measured_to_pay() -> None:
    assert resolved("cuda").output_feedback == "auto" == resolved("cuda", rounding="foem").output_feedback
    assert resolved("cpu").output_feedback == "off"
    without: tuple[dict[str, Any], ...] = (
        {"rounding": "rtn"}, {"rounding": "gptaq"}, {"token_importance": "none"}, {"num_samples": 4},
        {"output_feedback": "off"},
    )  # fmt: skip
    assert {resolved("cuda", **values).output_feedback for values in without} == {"off"}
    assert resolved("cpu", output_feedback="re:.*q_proj").output_feedback == "re:.*q_proj"


def test_learning_goes_on_from_feedback() -> None:
    learned = resolved("cuda", refine_steps=5, distill_steps=5)
    assert (learned.output_feedback, learned.refine_error) == ("auto", "output")
    assert resolved("cpu", refine_steps=5, refine_error="loss").refine_error == "loss"
