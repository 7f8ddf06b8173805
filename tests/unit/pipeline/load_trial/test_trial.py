"""A claim that transformers loads a folder is the result of a try: right, wrong and failing folders, and no try."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hawqtool.config import RunConfig
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.load_trial import child as load_child
from hawqtool.pipeline.load_trial import trial as load_trial
from hawqtool.pipeline.load_trial.trial import SWITCH, TrialProcess, _difference, started_ahead, try_loading
from hawqtool.pipeline.run.job import Job, prepare
from tests.support.packed_folder import linear_specs, mixed_formats, write_packed
from tests.support.tiny import tiny_model

ROWS = torch.arange(3, 35).view(1, -1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    source = tiny_model("llama", tmp_path_factory.mktemp("trial") / "source")
    return prepare(RunConfig(model=str(source), device="cpu", group_size=32))


@pytest.fixture(scope="module")
def packed(job: Job) -> Path:
    folder = job.index.folder.parent / "packed"
    write_packed(job.index.folder, folder)
    return folder


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)


def test_a_folder_that_loads_in_a_process_that_was_started_ahead(
    job: Job, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started_ahead(job) as process:
        assert process is None  # a CPU has nothing to wait for
    monkeypatch.setattr(load_trial, "_device", lambda _: "cpu")  # a real GPU would be asked for its memory
    with started_ahead(replace(job, device=torch.device("cuda"))) as process:
        assert process is not None
        monkeypatch.setattr(load_trial, "_CPU", "none")  # that it computes there keeps it from nothing
        trial = try_loading(job, packed, ROWS, process, verifies=True)
        child = process._child
    assert child.returncode == 0 and not process.is_ready  # what is tried next is tried by another
    assert trial.loads is True and "tried on this folder with transformers" in trial.reason
    assert "one forward pass agrees to 0.0" in trial.reason
    assert trial.problems == verify_folder(packed, job.index.folder, sealed=False).problems


def in_this_process(order: list[str], _: object) -> subprocess.CompletedProcess[bytes]:
    """What the child does, without the start of a process."""
    load_child.main(*order)
    return subprocess.CompletedProcess(order, 0, b"", b"")


def test_rounded_inputs_are_compared_in_float32(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 they would differ by a tenth and more."""
    monkeypatch.setattr(load_trial, "_run", in_this_process)
    write_packed(job.index.folder, tmp_path / "packed", mixed_formats(linear_specs(job.index), ("nvfp4-a4", "fp8-a8f")))
    trial = try_loading(job, tmp_path / "packed", ROWS)
    assert trial.loads is True and ("agrees to 0 (" in trial.reason or "e-" in trial.reason), trial.reason


def test_a_folder_whose_config_makes_transformers_compute_otherwise(
    job: Job, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads other weights than hawqtool does: those of the embedding are exchanged in the child's copy alone."""
    monkeypatch.setattr(load_trial, "_run", in_this_process)
    folder = Path(shutil.copytree(packed, tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_trial, "_own_outputs", lambda job, _, row: _own(job, packed, row))
        trial = try_loading(job, folder, ROWS)
    assert trial.loads is False and "it loads, but its outputs differ by" in trial.reason


_own = load_trial._own_outputs


def test_a_process_that_is_not_needed_is_ended() -> None:
    with TrialProcess("LlamaForCausalLM") as process:
        child = process._child
        assert child.poll() is None
    assert child.poll() is not None and child.stdin is not None and child.stdin.closed


def test_a_folder_that_does_not_load(job: Job, packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "broken"))
    (folder / "model.safetensors").unlink()
    trial = try_loading(job, folder, ROWS)
    assert trial.loads is False and trial.reason.startswith("tried with transformers") and "\n" not in trial.reason


@pytest.mark.parametrize("why", ["switched off", "compressed-tensors is not installed", "memory"])
def test_what_keeps_from_trying(why: str, job: Job, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "switched off":
        monkeypatch.setenv(SWITCH, "0")
    elif why == "memory":
        monkeypatch.setattr(load_trial, "_free_memory", lambda: 1000)
    else:
        monkeypatch.setattr(load_trial.util, "find_spec", lambda _: None)
    trial = try_loading(job, packed, ROWS)
    assert trial.loads is None and trial.reason.startswith("not tried: ") and why in trial.reason


def test_a_gpu_with_room_is_taken_and_what_fails_there_is_tried_on_the_cpu(
    job: Job, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(order: list[str], process: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(order[-1])
        fails = order[-1] == "cuda" or process is not None  # which got ready for a GPU
        return subprocess.CompletedProcess(order, 1) if fails else in_this_process(order, process)

    monkeypatch.setattr(load_trial, "_run", run)
    monkeypatch.setattr(load_trial, "_device", lambda _: "cuda")
    assert try_loading(job, packed, ROWS).loads is True and asked == ["cuda", "cpu"]
    monkeypatch.setattr(load_trial, "_device", lambda _: "cpu")
    ahead = TrialProcess("LlamaForCausalLM", "cuda")
    assert try_loading(job, packed, ROWS, ahead).loads is True and asked[2:] == ["cpu", "cpu"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    size, devices = job.index.total_bytes, dict[float, str]()
    for share in (0.1, 0.5):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, share=share: (size / share, 0))
        devices[share] = load_trial._device(replace(job, device=torch.device("cuda")))
    assert devices == {0.1: "cuda", 0.5: "cpu"} and load_trial._device(job) == "cpu"


def test_of_a_failure_of_many_lines_the_first_is_told() -> None:
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n    ~^^\n'
    told = load_trial._last_line(f"a warning\n{trace}AttributeError: no heads in {{\n  'a': 1,\n}}\n".encode(), 1)
    assert told == "AttributeError: no heads in {"
    assert load_trial._last_line(b"Killed by somebody\n", 1) == "Killed by somebody"
    assert load_trial._last_line(b"", 1) == "the process ended with 1"
    assert load_trial._last_line(b"x", -9) == "the process ended with -9"


def test_differences() -> None:
    logits = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    assert _difference(logits, logits + 3) < 1e-6  # the same distribution
    assert 0.005 < _difference(logits, logits * 1.01) < 0.02
    assert _difference(logits, logits.flip(-1)) > 0.5
    assert _difference(logits, logits[:, :4]) == float("inf")
    assert not _difference(logits, logits * float("nan")) <= load_trial.MAX_DIFFERENCE
