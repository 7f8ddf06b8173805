"""What is tried and checked of the folder that is shipped: once, and on a GPU beside other work."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hawqtool.config import RunConfig
from hawqtool.export.manifest import seal
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.load_trial import checks as module
from hawqtool.pipeline.load_trial.checks import ShippedChecks
from hawqtool.pipeline.load_trial.trial import LoadTrial, TrialProcess
from hawqtool.pipeline.run.identity import record_content, stamps
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import BitPlan
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = prepare(RunConfig(model=str(tiny_model("llama", tmp_path_factory.mktemp("checks") / "m")), device="cpu"))
    record_content(job.index, stamps(job.index), Silent())
    return job


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_are_made_once(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    threads, asked = list[str](), threading.Event()

    def noted(result: Any) -> Any:
        asked.wait()
        threads.append(threading.current_thread().name)
        return result

    monkeypatch.setattr(module, "try_loading", lambda *_: noted(LoadTrial(True, "tried")))
    monkeypatch.setattr(module, "verify_folder", lambda *_, **__: noted(SimpleNamespace(problems=("a problem",))))
    save_file({"a": torch.zeros(16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "reproduce").mkdir()
    (tmp_path / ".model.safetensors.part").write_text("left by a run that was killed")
    checks = ShippedChecks(replace(job, device=torch.device(device)), torch.zeros(1, 8, dtype=torch.int64))
    plan = BitPlan({unit.name: QuantFormat(4, 32) for unit in job.units}, 1, 1)
    for _ in range(2):
        checks.begin(tmp_path, plan)
    copied = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    own = ("config.json", "model.safetensors", "reproduce")
    assert not threads and sorted(path.name for path in tmp_path.iterdir()) == sorted((*copied, *own))
    asked.set()
    assert checks.trial() == LoadTrial(True, "tried") and checks.problems() == ("a problem",)
    assert threads == ["beside" if device == "cuda" else "MainThread"] * 2
    report: Any = {}
    sealed = seal(tmp_path, report, checks.hashes())["manifest"]
    assert checks.hashes()["model.safetensors"]["bytes"] == 128 and seal(tmp_path, report)["manifest"] == sealed


@pytest.mark.parametrize("found", [("seen there",), None])
def test_the_process_of_a_trial_on_a_gpu_verifies(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[str, ...] | None
) -> None:
    """Where it came to no end, it is done here."""
    asked = list[bool]()

    def try_loading(*given: Any) -> LoadTrial:
        asked.append(given[4])
        given[5]()  # until something is asked for
        return LoadTrial(True, "tried", found)

    monkeypatch.setattr(module, "try_loading", try_loading)
    monkeypatch.setattr(module, "verify_folder", lambda *_, **__: SimpleNamespace(problems=("seen here",)))
    plan = BitPlan({unit.name: QuantFormat(4, 32) for unit in job.units}, 1, 1)
    for device, expected in (("cuda", found or ("seen here",)), ("cpu", ("seen here",))):
        process = TrialProcess("LlamaForCausalLM", device)
        checks = ShippedChecks(replace(job, device=torch.device("cuda")), torch.zeros(1, 8), process)
        checks.begin(tmp_path, plan)
        assert checks.problems() == expected and checks.trial() is not None
    assert asked == [True, False]
