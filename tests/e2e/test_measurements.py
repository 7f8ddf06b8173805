"""Measurements that runs share: taken where all that matters is equal, made anew where anything differs."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hawqtool.config import RunConfig, load_config
from hawqtool.errors import InputError, UsageError
from hawqtool.export.manifest import weight_hashes
from hawqtool.pipeline.allocate import run_allocate
from hawqtool.pipeline.measure import run_measure
from hawqtool.pipeline.report import write_page
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.pipeline.stages import measure as measuring
from hawqtool.pipeline.stages.measure import wanted_formats
from hawqtool.pipeline.stages.measurement_cache import MeasurementFolder, measurement_fingerprint
from hawqtool.pipeline.stages.rows import gather_rows
from hawqtool.runtime.reporter import Silent
from tests.support.runs import Run, read, settings
from tests.support.tiny import tiny_llama

DOCUMENT = {
    "schema": "hawqtool.sensitivity/1",
    "model": "m",
    "model_fingerprint": "f",
    "rounding": "gptq",
    "settings": {"seconds": 1.0},
    "rows": {},
    "unquantized_bytes": 1,
    "units": {},
    "scores": {},
    "warnings": [],
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by an entry whenever something is really measured."""
    calls, real = [], measuring.measure

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append("measured")
        return real(*arguments, **keywords)

    monkeypatch.setattr(measuring, "measure", counted)
    return calls


def test_runs_that_differ_in_budget_measure_once_and_give_what_they_would_alone(
    run: Run, tmp_path: Path, measured: list[str]
) -> None:
    # Without a folder the first takes widths 4 and 8, the second 2, 3, 4 and 8.
    budgets, few = (6.0, 4.0), {"num_samples": 8, "seq_len": 16}
    alone = [run(target_bpw=budget, **few) for budget in budgets]
    assert len(measured) == 2
    shared = [run(target_bpw=budget, measurements=tmp_path / "kept", **few) for budget in budgets]
    assert len(measured) == 3
    assert [r["measurement"]["source"] for _, r in shared] == ["run", "shared"]
    assert [r["measurement"] for _, r in alone][0]["fingerprint"] is None
    for (folder, report), (other, expected) in zip(shared, alone, strict=True):
        assert report["plan"] == expected["plan"] and report["evaluation"]["mixed"]["kl"] > 0
        assert weight_hashes(folder) == weight_hashes(other) != {}
        assert report["config_fingerprint"] == expected["config_fingerprint"]
    key = shared[0][1]["measurement"]["fingerprint"]
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [f"{key}.json"]
    for folder, _ in shared:
        write_page(folder)
    for name in ("README.md", "report.html"):
        assert f"shared measurement, fingerprint {key[:12]}" in (shared[1][0] / name).read_text()
        assert "shared measurement" not in (shared[0][0] / name).read_text()
    # The file is one that --sensitivity takes, and a run from it is the same again.
    _, report = run(target_bpw=budgets[1], sensitivity=tmp_path / "kept" / f"{key}.json", **few)
    assert report["plan"] == shared[1][1]["plan"] and report["measurement"]["source"] == "file"


def fingerprint(place: Path, **options: Any) -> str:
    job = prepare(settings(place, **options))
    return measurement_fingerprint(
        job, wanted_formats(job, job_menu(job, None)), gather_rows(RunContext(job)), Silent()
    )


def test_the_fingerprint_holds_what_matters_and_nothing_else(place: Path, tmp_path: Path) -> None:
    base = fingerprint(place, target_bpw=4.0)
    same: list[dict[str, Any]] = [
        {"target_kl": 0.1},
        {"target_size": "1MB", "solver": "hull", "shortlist": 3, "output": "o", "overwrite": True},
        {"max_memory": "1KiB"},
        {"refine_steps": 5, "distill_steps": 5, "distill_codes": True},
        {"measurements": "elsewhere", "sensitivity": "fisher", "eval_data": str(place / "other.txt")},
    ]
    assert {fingerprint(place, **options) for options in same} == {base}
    other: list[dict[str, Any]] = [
        {"seed": 1},
        {"damping": 0.1},
        {"rounding": "rtn"},
        {"rounding": "foem"},
        {"bits": "4,8"},
        {"group_size": 64},
        {"num_samples": 12},
        {"calibration": str(place / "other.txt"), "num_samples": 4, "eval_samples": 2, "seq_len": 8},
        {"batch_size": 4},
        {"scale_sign": "positive"},
        {"sensitivity": "kl"},
        {"pin": ("re:.*down_proj=6",)},
        {"ignore": ("re:.*down_proj",)},
        {"quantize_lm_head": True},
    ]
    found = {fingerprint(place, **options) for options in other}
    assert len(found) == len(other) and base not in found

    # One weight of a copy differs; its header, which names the model elsewhere, does not.
    copy = tiny_llama(tmp_path / "copy")
    assert fingerprint(place, model=copy, target_bpw=4.0) == base
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(place, model=copy, target_bpw=4.0) != base


@pytest.mark.parametrize("damage", ["", "{", '{"schema": "hawqtool.sensitivity/1"}', json.dumps(DOCUMENT)])
def test_a_damaged_file_is_named_and_measured_anew(tmp_path: Path, damage: str) -> None:
    reporter = Silent()
    (tmp_path / "k.json").write_text(damage)
    (tmp_path / ".k.123.part").write_text("left by a killed process")
    document, found = MeasurementFolder(tmp_path, reporter).take("k", lambda: dict(DOCUMENT))
    assert not found and len(reporter.warnings) == 1 and "k.json" in reporter.warnings[0]
    kept = read(tmp_path / "k.json")
    assert len(kept.pop("checksum")) == 64 and kept == document == DOCUMENT | {"fingerprint": "k"}
    assert MeasurementFolder(tmp_path, reporter).take("k", pytest.fail) == (document, True)


def test_a_score_that_was_changed_is_measured_anew(tmp_path: Path) -> None:
    reporter, folder = Silent(), MeasurementFolder(tmp_path, Silent())
    scores = {"fisher": {"u": {"w4g32": [0.125, 0.5], "w8g32": [0.25, None]}}}
    folder.take("k", lambda: DOCUMENT | {"scores": scores})
    file = tmp_path / "k.json"
    file.write_text(file.read_text().replace("0.125", "0.625"))
    document, found = MeasurementFolder(tmp_path, reporter).take("k", lambda: DOCUMENT | {"scores": scores})
    assert not found and document["scores"] == scores
    assert "k.json differs from its checksum" in reporter.warnings[0]
    assert [p.name for p in tmp_path.iterdir()] == ["k.json"]


def test_who_needs_the_same_waits_and_others_do_not(tmp_path: Path) -> None:
    made: list[str] = []
    folder = MeasurementFolder(tmp_path / "kept", Silent())

    both = threading.Barrier(2)  # broken if one key waits for the other

    def slow(key: str) -> dict[str, Any]:
        both.wait(900)
        made.append(key)
        return dict(DOCUMENT)

    threads = [threading.Thread(target=folder.take, args=(k, lambda k=k: slow(k))) for k in "aaababab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["a", "b"] and not both.broken
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["a.json", "b.json"]


def test_a_failed_measurement_leaves_nothing_and_lets_the_next_try(tmp_path: Path) -> None:
    folder = MeasurementFolder(tmp_path, Silent())

    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.take("k", fail)
    assert list(tmp_path.iterdir()) == []
    assert not folder.take("k", lambda: dict(DOCUMENT))[1]


def test_a_full_or_read_only_folder_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    reporter = Silent()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        document, _ = MeasurementFolder(tmp_path, reporter).take("k", lambda: dict(DOCUMENT))
        assert "could not be kept" in reporter.warnings[0] and "Read-only" in reporter.warnings[0]
    assert list(tmp_path.iterdir()) == []
    MeasurementFolder(tmp_path, reporter).take("k", lambda: dict(DOCUMENT))
    monkeypatch.setattr(os, "open", refuse)
    assert MeasurementFolder(tmp_path, reporter).take("k", pytest.fail) == (document, True)


def test_a_folder_that_cannot_be_one_is_known_before_the_work(place: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, said in (("file", "is a file"), ("none/kept", "does not exist")):
        with pytest.raises(UsageError, match=said):
            run(target_bpw=4.0, measurements=tmp_path / name)
    with pytest.raises(UsageError, match="measurements are shared where something is measured"):
        load_config(None, {"model": "m", "measurements": "d", "plan": "p.json"})


def test_a_metric_measured_alone(place: Path, tmp_path: Path) -> None:
    documents = {}
    for metric in ("auto", "kron"):
        output = tmp_path / f"{metric}.json"
        documents[metric] = run_measure(settings(place, bits="2,4", sensitivity=metric), output, Silent())
    assert set(documents["kron"]["scores"]) == {"kron"} and documents["kron"]["projections"] == {}
    assert documents["kron"]["scores"]["kron"] == documents["auto"]["scores"]["kron"]
    with pytest.raises(UsageError, match=r"--sensitivity names a metric there, found .*kron\.json"):
        run_measure(settings(place, sensitivity=tmp_path / "kron.json"), tmp_path / "again.json", Silent())
    config = RunConfig(model="m", bits="2,4", group_size=32, target_bpw=3.5)
    with pytest.raises(InputError, match=r"no scores of projection \(it has kron\)"):
        run_allocate(config, tmp_path / "kron.json", tmp_path / "plan.json", Silent())
    assert run_allocate(
        config.model_copy(update={"sensitivity": "kron"}), tmp_path / "kron.json", tmp_path / "plan.json", Silent()
    )["layers"]


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_one_width_alone_is_scored(rounding: str, place: Path, tmp_path: Path) -> None:
    config = settings(place, bits="4", rounding=rounding)
    document = run_measure(config, tmp_path / "s.json", Silent())
    assert {label for scores in document["scores"].values() for unit in scores.values() for label in unit} == {"w4g32"}
