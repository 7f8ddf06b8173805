"""Which layers have output feedback, and what rounding needs rows for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.run import job as jobs
from hawqtool.pipeline.run.job import prepare
from tests.support.tiny import tiny_model


def test_output_feedback_that_nobody_asked_for_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model("llama", tmp_path / "model"))
    job = prepare(RunConfig(model=model, device="cpu", target_bpw=4.5, group_size=32), writes=False)
    assert not job.feedback_layers and "feedback" not in describe(job)["rounding"]
    job = replace(job, settings=replace(job.settings, output_feedback="auto"))  # as on a GPU
    taken = {name.rpartition(".")[2] for name in job.feedback_layers}
    assert taken >= {"q_proj", "k_proj", "o_proj", "down_proj"}
    assert describe(job)["rounding"] == "gptq, output feedback"
    sizes = {member.name: member.out_features for unit in job.units for member in unit.members}
    monkeypatch.setattr(jobs, "FEEDBACK_BYTES", sum(2 * sizes[name] ** 2 for name in job.feedback_layers))
    assert job.feedback_layers
    monkeypatch.setattr(jobs, "FEEDBACK_BYTES", jobs.FEEDBACK_BYTES - 1)
    assert not job.feedback_layers
    assert replace(job, config=job.config.model_copy(update={"output_feedback": "auto"})).feedback_layers


def test_gram_steps_are_told_and_need_a_fourth_row(tmp_path: Path) -> None:
    model = str(tiny_model("llama", tmp_path / "model"))
    config = RunConfig(model=model, device="cpu", target_bpw=4.5, group_size=32, gram_steps=9, refine_steps=3)
    fed = config.model_copy(update={"output_feedback": "re:.*q_proj", "refine_learner": "gumbel"})
    told = [str(describe(prepare(given, writes=False))["rounding"]) for given in (config, fed)]
    assert told[0] == "gptq, 9 Gram steps, 3 refinement steps"
    assert told[1] == "gptq, output feedback, 9 Gram steps where there is no feedback, 3 annealed refinement steps"
    with pytest.raises(UsageError, match="--gram-steps are judged on every 4th .* raise it to 5"):
        prepare(config.model_copy(update={"num_samples": 4}), writes=False)
