"""serve.py with stand-ins of vLLM and torch in the engine's process: the rows, the lines and the comparison."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hawqtool.export import engines
from hawqtool.export.config_checks import field_problems
from tests.support.runs import Run, mixed, place, run  # noqa: F401

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/benchmarks"

VLLM = """
class SamplingParams:
    def __init__(self, **given):
        self.given = given

class LLM:
    def __init__(self, **given):
        if "compilation_config" in given:
            raise RuntimeError("no graphs on this card")
        assert given["kv_cache_memory_bytes"] and given["enforce_eager"]

    def apply_model(self, look):
        class Model:
            parameters = buffers = lambda self: []
        return [look(Model())]

    def generate(self, prompts, wanted, use_tqdm):
        assert not use_tqdm
        if len(prompts) == 3:
            raise ValueError("three streams are too many")
        class Output:
            def __init__(self, row):
                known = type("Logprob", (), {"logprob": -2.5})
                self.prompt_logprobs = [None, *({token: known} for token in row[1:])]
        return [Output(prompt["prompt_token_ids"]) for prompt in prompts]
"""
TORCH = """
__version__ = "2.11"
class cuda:
    memory_allocated = staticmethod(lambda: 7)
    get_device_properties = staticmethod(lambda _: type("Card", (), {"name": "H200", "major": 9, "minor": 0}))
"""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import serve

    return serve


def test_engine_and_own_figures_of_a_folder(
    serve: Any,
    place: Path,  # noqa: F811
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HAWQTOOL_LOAD_TRIAL", "0")
    folder, _ = run(bits="4", rounding="rtn")
    engine = tmp_path / "engine"
    for name, source in (("vllm", VLLM), ("torch", TORCH)):
        (engine / name).mkdir(parents=True)
        (engine / name / "__init__.py").write_text(source)
    (engine / "vllm-0.26.0.dist-info").mkdir()
    (engine / "vllm-0.26.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    results = tmp_path / "results.jsonl"
    given = ["--original", place / "model", "--text", place / "other.txt", "--rows", 4, "--seq-len", 32, "--prefill", 8]
    given += ["--streams", "1,3", "--generated", 4, "--engine-path", engine, "--results", results, folder]
    assert serve.main([str(value) for value in given]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    steps = [(line["name"], line["step"], "error" in line) for line in lines]
    for name in ("original", folder.name):
        assert [(step, failed) for who, step, failed in steps if who == name and step not in ("own", "compared")] == [
            *(("start", True), ("start", False), ("load", False), ("weights", False), ("perplexity", False)),
            *(("prefill", False), ("decode", False), ("decode", True), ("end", False)),
        ]
        served = next(line for line in lines if line["name"] == name and line["step"] == "perplexity")
        assert served["perplexity"] == pytest.approx(math.exp(2.5)) and (served["rows"], served["seq_len"]) == (
            4,
            32,
        )
        compared = next(line for line in lines if line["name"] == name and line["step"] == "compared")
        assert compared["engine"] == served["perplexity"] and not compared["close"]
    assert next(line for line in lines if line["step"] == "load")["card"] == "H200"
    # What agrees is kept, in the place of an older run of the same.
    runs = tmp_path / "runs.json"
    runs.write_text("[]")
    monkeypatch.setattr(engines, "RUNS_FILE", runs)
    with results.open("a") as stream:
        stream.write(json.dumps({"name": folder.name, "step": "compared", "difference": 0.001}) + "\n")
    for _ in range(2):
        serve.keep_runs(argparse.Namespace(results=results, folders=[folder, tmp_path / "another"]))
    (kept,) = (engines.EngineRun(**run) for run in json.loads(runs.read_text()))
    assert (kept.version, kept.card, kept.labels, kept.cache) == ("0.26.0", "H200", ["w4g32"], None)
    assert any("three streams are too many" in line.get("error", "") for line in lines)


@pytest.mark.parametrize("label", ["16", "fp8-a8f+fp8", "fp8-a8f/nvfp4", "w8ch/w4g64/w3g64/w2g64"])
def test_configurations_without_weights(serve: Any, label: str, tmp_path: Path) -> None:
    from serving.shapes import write_configuration

    folder = write_configuration("llama-3-8b", label, tmp_path / "shape")
    found = json.loads((folder / "config.json").read_text()).get("quantization_config")
    assert (found is None) == (label == "16")
    assert found is None or field_problems(found) == []
    assert "/" not in label or set(found["config_groups"]) == set(label.split("/"))
