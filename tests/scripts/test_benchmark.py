"""benchmark.py on a tiny shape: every stage runs, its parts add up, its checkpoints are those of the shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.checkpoint.index import read_index

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/benchmarks"
RATES = {
    "bfloat16": 1e12,
    "float32": 1e11,
    "coarse": 1e11,
    "float64": 1e10,
    "memory": 1e10,
    "to_device": 1e10,
    "disk_read": 1e9,
    "disk_write": 1e9,
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def benchmark(scripts: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    import benchmark
    from speed.rates import Rates

    monkeypatch.setattr(benchmark, "measure_rates", lambda device, folder: Rates(**RATES))  # probes take seconds
    return benchmark


def arguments(work: Path, *more: str) -> list[str]:
    fixed = "--shape tiny --rows 4 --scoring-rows 2 --seq-len 16 --group-size 32 --device cpu --batch-size 2"
    return [*fixed.split(), "--bits", "4,8", "--target-bpw", "5", "--work", str(work), *more]


def test_every_stage_runs_and_its_parts_add_up(benchmark: Any, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    assert benchmark.main(arguments(tmp_path / "work", "--json", str(found), "--max-memory", "1KiB")) == 0
    document = json.loads(found.read_text())
    stages = {stage["stage"]: stage for stage in document["stages"]}
    assert list(stages) == list(benchmark.STAGES)
    for name, stage in stages.items():
        assert stage["seconds"] > 0 and stage["host_bytes"] > 1 << 20
        assert (stage["floor"] is None) == (name == "allocate")
    rounding = stages["round"]
    steps = {"load", "forward", "gram", "factor", "scale search", "column loop", "losses", "write", "dequantize"}
    assert steps == set(rounding["parts"])
    spent = document["shape"]["blocks"] * sum(seconds for seconds, _ in rounding["parts"].values())
    assert 0.3 * rounding["seconds"] < spent <= rounding["seconds"]
    assert document["hidden_states"]["disk"] > 0


def test_a_stage_that_lacks_an_earlier_one_says_so(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments(tmp_path, "--stages", "verify")) == 2
    assert "stage verify needs the folder of stage round" in capsys.readouterr().err
    assert benchmark.main(arguments(tmp_path, "--stages", "cook")) == 2
    assert "'cook'" in capsys.readouterr().err


def test_the_floor_of_llama_3_8b(scripts: None, tmp_path: Path) -> None:
    from hawqtool.config import RunConfig
    from hawqtool.pipeline.run.job import prepare
    from speed.floor import block_work
    from speed.shapes import SHAPES, write_checkpoint

    folder = write_checkpoint(SHAPES["llama-3-8b"], tmp_path / "m", torch.device("cpu"), sparse=True)
    index = read_index(folder)
    assert sum(info.num_bytes for info in index.tensors.values()) == 2 * 8_030_261_248  # parameters of Llama 3 8B
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 1 << 20
    work = block_work(prepare(RunConfig(model=str(folder), device="cpu", token_importance="none")), 128, 2048)
    # 218.1e6 weights, 262,144 tokens: 114.3 TFLOP in linears, and attention to half of 8.8; 134.1 / 2 in Gram matrices.
    assert work.forward == pytest.approx(114.3e12 + 8.8e12 / 2, rel=0.002)
    assert work.gram == pytest.approx(134.1e12 / 2, rel=0.002)
    assert work.columns == pytest.approx(1.49e12, rel=0.01)
