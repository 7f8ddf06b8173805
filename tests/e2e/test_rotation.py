"""`rotate`: a tied model is rotated, rounded, written untied at the predicted size, verified, evaluated and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hawqtool.errors import InputError, UsageError
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.evaluate import run_evaluate
from hawqtool.pipeline.measure import run_measure
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.pipeline.search.planner import given_plan
from hawqtool.runtime.reporter import Silent
from tests.e2e.test_resume import Interrupt, quantize, result_without_scores
from tests.support.runs import Report, edited, read, settings
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def rotated(place: Path) -> tuple[dict[str, Any], Path, Report]:
    """Settings, the folder that they gave, and its report."""
    model = tiny_llama(place / "tied", tie=True)
    options = {"model": model, "rotate": "on", "bits": "4", "target_bpw": 4.5, "num_samples": 8, "seed": 3}
    report = quantize(settings(place, output=place / "rotated", **options))
    return options, place / "rotated", report


def test_the_record_and_the_size(place: Path, rotated: tuple[dict[str, Any], Path, Report]) -> None:
    options, folder, report = rotated
    found = report["rotation"]
    assert {key: found[key] for key in ("kind", "seed", "version", "channels")} == read(folder / "reproduce/plan.json")[
        "rotation"
    ]
    assert (found["seed"], found["channels"]) == (3, 64)
    assert 0 < found["difference"] < 2e-6 and 0 < found["kl"] < 1e-4
    job = prepare(settings(place, plan=str(folder / "reproduce/plan.json"), **options | {"target_bpw": None}))
    layout = job.layout(given_plan(job.config, job.units).formats)
    assert layout.total_bytes == report["sizes"]["quantized_bytes"] == (folder / "model.safetensors").stat().st_size
    assert read(folder / "config.json")["tie_word_embeddings"] is False
    assert job_menu(job, None)  # the rotated job is one like any other


def test_the_folder_is_that_of_its_source(
    place: Path, tmp_path: Path, rotated: tuple[dict[str, Any], Path, Report]
) -> None:
    options, folder, report = rotated
    assert verify_folder(folder, options["model"]).problems == ()
    again = run_evaluate(settings(place, model=options["model"], eval_data=place / "other.txt"), folder, Silent())
    assert again["original"]["kl"] == 0 < again["quantized"]["kl"]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    plan = folder / "reproduce/plan.json"
    kept = plan.read_bytes()
    try:
        edited(plan, plan, lambda document: document["rotation"].update(seed=4))
        problems = verify_folder(folder, options["model"]).problems
        assert any("tensor lm_head.weight differs from the source's" in problem for problem in problems)
        edited(plan, plan, lambda document: document["rotation"].update(version=9))
        with pytest.raises(InputError, match="expected kind hadamard of version 1"):
            verify_folder(folder, options["model"])
    finally:
        plan.write_bytes(kept)


def test_interrupted_runs_and_saved_scores(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotated: tuple[dict[str, Any], Path, Report]
) -> None:
    options, folder, _ = rotated
    config = settings(place, output=tmp_path / "out", **options)
    interrupt = Interrupt(monkeypatch)
    for key in ("rotation", ".block.0"):
        interrupt.stop = key
        with pytest.raises(KeyboardInterrupt):
            quantize(config)
    interrupt.stop = None
    with pytest.raises(UsageError, match="rotate was on, is off"):
        quantize(config, rotate="off")
    assert quantize(config)["starts"] == 3
    assert result_without_scores(tmp_path / "out") == result_without_scores(folder)
    run_measure(
        settings(place, **options | {"rotate": "off", "target_bpw": None, "bits": "3,4"}), tmp_path / "s.json", Silent()
    )
    with pytest.raises(UsageError, match="another checkpoint .* or with another --rotate"):
        quantize(config, output=str(tmp_path / "new"), sensitivity=str(tmp_path / "s.json"), bits=(3, 4))
