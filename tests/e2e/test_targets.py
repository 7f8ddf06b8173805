"""Quality targets, and the short list of plans that are tried beside the metric's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.run.job import prepare
from tests.support.runs import MIXED_TARGET, Report, Run, read, settings


@pytest.fixture(scope="module")
def bound(mixed: tuple[Path, Report]) -> float:
    """A divergence that plans of the menu reach, and not only the largest."""
    return 1.5 * mixed[1]["evaluation"]["mixed"]["kl"]


def test_the_smallest_plan_that_meets_a_bound(run: Run, bound: float) -> None:
    folder, report = run(bits="2,3,4,8", target_kl=bound)
    search = report["search"]
    assert search["met"] and report["gates"][0]["passed"]
    # The selection rows choose; the report rows may lie on either side of the bound.
    assert report["evaluation"][report["shipped"]]["selection"]["kl"] <= bound
    missed = search["largest_that_misses"]
    # Between the two lies at most one step of one unit.
    assert 0 < report["sizes"]["stored_bytes_linears"] - missed["stored_bytes"] <= 2048
    assert missed["divergence"]["selection"] > bound
    assert len(search["trials"]) <= 8
    assert read(folder / "report.json")["search"] == search
    assert report["sizes"]["quantized_bytes"] == (folder / "model.safetensors").stat().st_size


def test_a_bound_out_of_reach_leaves_the_best_plan_and_a_failed_gate(run: Run) -> None:
    folder, report = run(bits="2,3", target_kl=1e-9)
    assert not report["search"]["met"]
    (gate,) = report["gates"]
    assert (gate["name"], gate["limit"], gate["passed"]) == ("target_kl", 1e-9, False)
    assert {entry["bits"] for entry in report["plan"]} == {3}
    assert (folder / "model.safetensors").is_file()


def test_a_loose_bound_takes_the_smallest_plan_at_once(run: Run) -> None:
    _, report = run(bits="2,3", target_kl=100.0)
    assert {entry["bits"] for entry in report["plan"]} == {2}
    assert len(report["search"]["trials"]) == 1


def test_a_bound_with_one_width_is_only_checked(run: Run) -> None:
    _, report = run(bits="3", target_kl=100.0)
    assert {entry["bits"] for entry in report["plan"]} == {3}
    assert report["gates"][0]["passed"] and report["metric"] is None


def test_a_dry_run_states_the_bound(place: Path) -> None:
    found = describe(prepare(settings(place, bits="2,3,4,8", target_kl=0.1)))
    assert found["target_kl"] == 0.1 and found["budget_bpw"] is None


def test_the_short_list_is_tried_and_its_best_plan_reported(run: Run) -> None:
    _, report = run(bits="2,3,4,8", target_bpw=MIXED_TARGET, shortlist=5)
    evaluation = report["evaluation"]
    tried = evaluation["tried"]
    assert next(iter(tried)) == "projection" and 2 <= len(tried) <= 5
    best = min(tried, key=lambda name: tried[name]["selection"]["kl"])
    assert evaluation["mixed"]["chosen_by"] == best
    assert evaluation["mixed"]["kl"] == tried[best]["kl"]
    own = next(iter(tried))
    assert tried[own]["predicted"][own] == pytest.approx(tried[own]["predicted_loss"])
    for values in (*tried.values(), evaluation["uniform"]):
        assert own in values["predicted"] and values["selection"]["num_tokens"] > 0
    for values in tried.values():
        assert set(values["minus_uniform"]) == {"selection", "report"}
        assert values["bpw_linears"] <= MIXED_TARGET


def test_by_default_the_metrics_own_plan_and_the_rule_are_tried(run: Run, place: Path) -> None:
    """The rows that choose are of two sources: the text, and the model itself."""
    sources = {"selection_samples": 12, "selection_data": ()}
    _, report = run(bits="2,3,4,8", target_bpw=MIXED_TARGET, **sources)
    evaluation = report["evaluation"]
    assert list(evaluation["tried"]) == ["projection", "by-role rule"]
    assert report["rows"]["selection"]["count"] == 12
    assert report["rows"]["selection"]["source"] == "text.txt (6 rows), self (6 rows)"
    assert evaluation["selection"]["plans"] == 2 and set(evaluation["selection"]["by_source"]) == {"text.txt", "self"}
    assert evaluation["selection"]["errors_needed"] > 1.96


def test_a_short_list_of_one_has_the_metrics_own_plan_alone(run: Run) -> None:
    _, report = run(bits="2,3,4,8", target_bpw=MIXED_TARGET, shortlist=1)
    evaluation = report["evaluation"]
    assert list(evaluation["tried"]) == ["projection"]
    assert evaluation["uniform"]["selection"]["num_tokens"] > 0
    assert list(evaluation["tried"]["projection"]["predicted"]) == ["projection"]


def test_swaps_add_plans_within_the_budget(run: Run) -> None:
    _, report = run(bits="2,3,4,8", target_bpw=4.0, sensitivity="hawq-ggn", swaps=2)
    tried = report["evaluation"]["tried"]
    assert list(tried)[:3] == ["hawq-ggn", "by-role rule", "width swap 1"]
    assert tried["width swap 1"]["selection"]["kl"] < tried["hawq-ggn"]["selection"]["kl"]
    assert all(values["bpw_linears"] <= 4.0 for values in tried.values())
    assert report["timings"]["width swap"] > 0
    best = min(tried, key=lambda name: tried[name]["selection"]["kl"])
    assert report["evaluation"]["mixed"]["chosen_by"] == best


def test_swaps_by_gradient_improve_a_plan_of_poor_scores(run: Run) -> None:
    """What was put together is what is written: without feedback and learning, rounding gives nearly the same."""
    changes = {"extra_group_sizes": (64, "channel"), "profile": "transformers", "sensitivity": "hawq-ggn"}
    changes |= {"selection_samples": 48, "swaps": 3, "swap_scores": "gradient"}
    _, report = run(bits="2,3,4", target_bpw=3.3, shortlist=1, **changes)
    evaluation = report["evaluation"]
    tried, attempts = evaluation["tried"], evaluation["swaps"]
    taken = [attempt for attempt in attempts if attempt["accepted"]]
    rounds = [attempt["round"] for attempt in taken]
    assert taken and rounds == sorted(set(rounds))
    *others, last = (plan["selection"]["kl"] for plan in tried.values())
    assert list(tried)[-1] == "width swap 1"
    gained = last - min(others)
    assert gained < 0 and gained == pytest.approx(sum(attempt["measured"] for attempt in taken), rel=0.5)
    assert all(values["bpw_linears"] <= 3.3 for values in tried.values())
    assert tried["width swap 1"]["stored_bytes"] == taken[-1]["stored_bytes"]


def test_without_a_choice_nothing_is_swapped(run: Run) -> None:
    _, report = run(bits="3", target_bpw=3.5, swaps=2)
    assert "width swap" not in report["timings"]
    assert list(report["evaluation"]["tried"]) == ["uniform menu"]


@pytest.mark.parametrize("flags", [{"swaps": 1}, {"shortlist": 2}])
def test_what_a_quality_target_would_ignore_is_refused(place: Path, flags: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="target_kl too"):
        settings(place, target_kl=0.1, **flags)
