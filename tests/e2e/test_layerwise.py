"""A run that compares its plans layerwise rounds the model once, and says what it compared."""

from __future__ import annotations

from hawqtool.cli.render import result_lines
from hawqtool.report.card import model_card
from tests.support.runs import Run, plan_bits


def test_plans_are_compared_and_one_is_carried_out(run: Run) -> None:
    folder, report = run(bits="2,3,4", target_bpw=4.0, proof="layerwise")
    evaluation, timings = report["evaluation"], report["timings"]
    assert len([stage for stage in timings if stage.startswith("round ")]) == 1 and timings["compare plans"] > 0
    assert len(set(plan_bits(folder).values())) > 1 or report["shipped"] == "uniform"
    (shipped,) = evaluation["tried"]
    assert shipped == evaluation["mixed"]["chosen_by"] and set(evaluation["mixed"]["formats"])
    rivals = evaluation["not_rounded"]
    assert any(name.startswith("uniform") for name in {shipped, *rivals})
    lines = [line for line in result_lines(report) if line.startswith("rival")]
    assert len(lines) == len(rivals) and all("rounded one by one" in line for line in lines)
    assert "rounded one by one" in model_card(report, None)
    assert evaluation["selection"]["plans"] >= 1
    assert set(evaluation["mixed"]["predicted"]) == {"projection"}  # no other metric was measured
