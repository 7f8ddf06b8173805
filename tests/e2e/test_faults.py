"""What happens to a run when its model, its disk or its memory fails it under way."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hawqtool.checkpoint.index import read_index
from hawqtool.cli.app import app
from hawqtool.config import RunConfig
from hawqtool.errors import InputLostError, NumericalError, ResourceError
from hawqtool.pipeline import quantize as module
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.run.files import file_hash
from hawqtool.pipeline.run.folder import RunFolder
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.runtime.reporter import Silent
from tests.support.runs import read, settings
from tests.support.tiny import tiny_llama

SMALL: dict[str, Any] = {"bits": "4", "target_bpw": 4.5, "num_samples": 8, "seq_len": 16, "eval_samples": 4}


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_page", lambda *_: None)


@pytest.fixture
def config(place: Path, tmp_path: Path) -> RunConfig:
    tiny_llama(tmp_path / "model")
    (tmp_path / "runs").mkdir()
    return settings(place, model=tmp_path / "model", output=tmp_path / "runs/out", **SMALL)


def quantize(config: RunConfig, announced: Callable[[], object] = lambda: None, **changes: Any) -> dict[str, Any]:
    config = config.model_copy(update=changes)
    return run_quantize(config, "hawqtool quantize", Silent(), lambda _: announced() and None)


# The model's files change once the run has read their headers.


@pytest.mark.parametrize("kind", ["truncated", "longer", "written", "gone"])
def test_a_model_that_changes_under_way(config: RunConfig, kind: str) -> None:
    weights = Path(config.model) / "model.safetensors"

    def change() -> None:
        content = weights.read_bytes()
        if kind == "gone":
            weights.unlink()
        elif kind == "written":
            os.utime(weights, ns=(0, 0))
        else:
            weights.write_bytes(content[: len(content) // 2] if kind == "truncated" else content + b"0")

    with pytest.raises(
        InputLostError, match=r"model.safetensors (changed while|was written to while|is gone|ended|cannot)"
    ):
        quantize(config, change)
    assert not Path(config.output or "").exists()


class Changing(Silent):
    """Calls something once: when the weights were hashed, or when a later stage is under way."""

    def __init__(self, change: Callable[[], object], later: bool = False) -> None:
        super().__init__()
        self.change, self.later, self.changed = change, later, False

    def progress(self, stage: str, done: int, total: int) -> None:
        now = not stage.startswith("fingerprint") if self.later else done == total
        if now and not self.changed:
            self.changed = True
            self.change()


def rewrite(file: Path, byte: int, stray: bytes) -> None:
    """Put another byte into a file; size and time stay."""
    before, content = file.stat(), bytearray(file.read_bytes())
    assert content[byte : byte + 1] != stray
    content[byte : byte + 1] = stray
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "tokenizer.json"])
def test_a_change_that_no_size_or_time_tells(config: RunConfig, name: str) -> None:
    folder = Path(config.model)
    if name == "tokenizer.json":
        reporter = Changing(lambda: rewrite(folder / name, 1, b" "), later=True)
        said = "tokenizer.json of the model changed while the run lasted"
    else:
        info = read_index(folder).tensors[name]
        reporter = Changing(lambda: rewrite(info.file, info.start, b"\x55"))
        said = f"tensor {name} of .* changed while the run lasted"
    with pytest.raises(InputLostError, match=said):
        run_quantize(config, "hawqtool quantize", reporter, lambda _: None)
    assert reporter.changed and not Path(config.output or "").exists()


def test_weights_that_are_only_touched_are_the_same(config: RunConfig) -> None:
    weights = Path(config.model) / "model.safetensors"
    reporter = Changing(lambda: os.utime(weights, ns=(0, 0)), later=True)
    run_quantize(config, "hawqtool quantize", reporter, lambda _: None)
    assert reporter.changed and (Path(config.output or "") / "report.json").is_file()


def test_nan_that_comes_from_a_change_is_said_to_be_one(config: RunConfig) -> None:
    weights = Path(config.model) / "model.safetensors"

    def change() -> None:
        tensors = {name: tensor.fill_(torch.nan) for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})

    with pytest.raises(InputLostError, match="was written to while the run lasted"):
        quantize(config, change)


# Numbers.


def test_activations_that_overflow_name_their_block(config: RunConfig) -> None:
    weights = Path(config.model) / "model.safetensors"
    tensors = load_file(weights)
    for name in ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"):  # finite weights, infinite product
        tensors[f"model.layers.1.{name}.weight"].fill_(1e30)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(NumericalError, match=r"block model\.layers\.1 holds NaN or Inf") as caught:
        quantize(config)
    assert caught.value.exit_code == 5
    assert list(Path(config.output or "").parent.iterdir()) == []


# Memory of a GPU, whose error a CPU run can raise as well.


def scarce(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Evaluators fail with more than so many rows per batch; returns the numbers that were tried."""
    tried: list[int] = []
    walked = Evaluator.last_states

    def failing(self: Evaluator, *arguments: Any) -> Any:
        tried.append(self.job.settings.batch_size)
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return walked(self, *arguments)

    monkeypatch.setattr(Evaluator, "last_states", failing)
    return tried


def test_smaller_batches_are_a_warning_and_recorded(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = scarce(monkeypatch, 8)
    report = quantize(config)
    assert tried[:2] == [16, 8] and report["batch_size"] == 8
    said = "out of GPU memory with 16 rows per batch: everything was done again with 8"
    assert said in report["warnings"]
    output = Path(config.output or "")
    assert read(output / "report.json")["config"]["batch_size"] == 8
    expected = output.with_name("expected")
    quantize(config, batch_size=8, output=str(expected))
    assert file_hash(output / "model.safetensors") == file_hash(expected / "model.safetensors")


def test_halved_batches_are_remembered(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce(monkeypatch, 8)
    monkeypatch.setattr(module, "try_plans", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(config)
    monkeypatch.undo()
    monkeypatch.setattr(module, "write_page", lambda *_: None)
    report = quantize(config)
    assert report["batch_size"] == 8 and "done again with 8" in report["warnings"][-1]


@pytest.mark.parametrize(("given", "expected"), [(None, [16, 8, 4]), (16, [16])])
def test_memory_that_never_suffices(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, given: int | None, expected: list[int]
) -> None:
    tried = scarce(monkeypatch, 0)
    with pytest.raises(ResourceError, match=r"out of GPU memory with \d+ rows per batch \(CUDA out of memory"):
        quantize(config, batch_size=given)
    assert tried == expected


# Disks.


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("command", "name"), [("quantize", "out"), ("measure", "s.json")])
def test_a_read_only_disk_shows_before_the_work(place: Path, read_only: Path, command: str, name: str) -> None:
    target = ("--target-bpw", "4.5") if command == "quantize" else ()
    text = ("--calibration", str(place / "text.txt"))
    done = CliRunner().invoke(app, [command, str(place / "model"), "-o", str(read_only / name), *text, *target])
    assert done.exit_code == 5
    assert "read-only" in done.stderr.lower() and len(done.stderr.splitlines()) == 1


def test_two_runs_into_one_output(place: Path, tmp_path: Path) -> None:
    command = ["quantize", str(place / "model"), "-o", str(tmp_path / "out"), "--target-bpw", "4.5"]
    with RunFolder(tmp_path / "out", Silent()):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "another run into" in done.stderr and len(done.stderr.splitlines()) == 1
