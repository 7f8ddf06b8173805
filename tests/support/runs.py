"""Shared by the end-to-end tests: a tiny checkpoint with text, runs on it, and edits of their files."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.config import RunConfig
from hawqtool.export.manifest import seal
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.writer import copy_small_files
from hawqtool.pipeline import quantize
from hawqtool.pipeline.measure import run_measure
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import tiny_llama

Report = Any
"""Of a run: tests change it and make up parts of it."""
Run = Callable[..., tuple[Path, Report]]
LETTERS = string.ascii_lowercase[:12]
BLOCK_LINEARS = 7
PACKED = ".weight_packed"
MIXED_TARGET = 5.0
"""Leaves room above w4g32, the best uniform plan that fits, so that a mixed plan is better and shipped."""


def random_text(seed: int, length: int) -> str:
    generator = random.Random(seed)
    words = ("".join(generator.choices(LETTERS, k=generator.randint(1, 7))) for _ in range(length // 3))
    return " ".join(words)[:length]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two texts and the source model."""
    folder = tmp_path_factory.mktemp("e2e")
    (folder / "text.txt").write_text(random_text(1, 4000))
    (folder / "other.txt").write_text(random_text(2, 1000))
    tiny_llama(folder / "model")
    return folder


def settings(place: Path, **overrides: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": str(place / "model"),
        "calibration": str(place / "text.txt"),
        "num_samples": 16,
        "seq_len": 32,
        "eval_samples": 8,
        "group_size": 32,
        "device": "cpu",
    }
    if "calibration" not in overrides:  # rows that the model writes take a moment
        values |= {"selection_samples": 8, "selection_data": values["calibration"]}
    return RunConfig(**(values | {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}))


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run with overrides into a new folder; returns it and the report.

    Drawing a page takes longer than all else; the folder of `mixed` has one.
    """
    monkeypatch.setattr(quantize, "write_page", lambda *_: None)

    def call(**overrides: Any) -> tuple[Path, Report]:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        config = settings(place, output=output, **overrides)
        return output, run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)

    return call


@pytest.fixture(scope="session")
def mixed(place: Path) -> tuple[Path, Report]:
    """One mixed run that many tests look at; nobody may change it."""
    config = settings(place, output=place / "mixed", bits="2,3,4,8", target_bpw=MIXED_TARGET)
    return place / "mixed", run_quantize(config, "hawqtool quantize", Silent(), lambda _: None)


@pytest.fixture(scope="session")
def sensitivity(place: Path) -> Path:
    run_measure(settings(place, bits="2,3,4,8"), place / "sensitivity.json", Silent())
    return place / "sensitivity.json"


def read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    assert isinstance(document, dict)
    return document


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = read(source)
    change(document)
    target.write_text(json.dumps(document))
    return target


def completed(folder: Path, source: Path, **config: Any) -> Path:
    """A folder that was only rounded, with what a whole run adds: the small files, a report, the manifest."""
    copy_small_files(source, folder)
    report: Any = {"schema": "hawqtool.report/2", "config": config}
    seal(folder, report)
    return folder


def plan_bits(folder: Path) -> dict[str, int]:
    return {entry["name"]: entry["bits"] for entry in read(folder / "reproduce/plan.json")["layers"]}


def differing_share(first: Path, second: Path, part: str = "") -> float:
    a, b = PackedReader(first), PackedReader(second)
    names = [n.removesuffix(PACKED) for n in a.index.tensors if n.endswith(PACKED) and part in n]
    different = [(a.codes(n)[0] != b.codes(n)[0]).float().flatten() for n in names]
    return float(torch.cat(different).mean())
