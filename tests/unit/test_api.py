"""The public functions: typed, silent, light to import, and as the page about them says."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hawqtool
from hawqtool import api
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = (api.quantize, api.measure, api.allocate, api.evaluate, api.verify)
SETTINGS: dict[str, Any] = {"num_samples": 8, "seq_len": 32, "eval_samples": 4, "group_size": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    (folder / "text.txt").write_text(random_text(1, 4000))
    (folder / "other.txt").write_text(random_text(2, 2000))
    tiny_llama(folder / "model")
    return folder


@pytest.fixture(scope="module")
def result(place: Path) -> hawqtool.Result:
    return hawqtool.quantize(
        place / "model",
        place / "out",
        bits=4,
        target_bpw=4.5,
        calibration=[place / "text.txt"],
        max_kl=1e-9,
        **SETTINGS,
    )


def test_the_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, hawqtool\n"
        "hawqtool.quantize, hawqtool.verify, hawqtool.RunConfig\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(hawqtool.__file__).parent / "py.typed").is_file()
    assert "py.typed" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", hawqtool.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(hawqtool, name))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: str(function.__name__))
def test_every_function_states_arguments_and_errors(function: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert set(function.__annotations__) == {*inspect.signature(function).parameters, "return"}
    assert all(part in text for part in ("Args:", "Returns:", "Raises:"))
    assert all(f"\n    {name}: " in text for name in inspect.signature(function).parameters)


def test_unknown_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="'quantise'"):
        _ = hawqtool.quantise


def test_a_result_has_report_and_plan(result: hawqtool.Result, place: Path) -> None:
    assert result.folder == place / "out"
    assert result.report == json.loads((result.folder / "report.json").read_text())
    assert result.plan == json.loads((result.folder / "reproduce/plan.json").read_text())
    assert result.warnings == tuple(result.report["warnings"])
    assert result.report["command"].startswith("hawqtool.quantize(model='model', output='out', target_bpw=4.5")
    assert str(place) not in json.dumps(result.report)


def test_a_failed_gate_is_no_error(result: hawqtool.Result) -> None:
    assert not result.passed and result.folder.is_dir()


def test_rows_are_sampled_in_silence(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rows of the model itself come from a model that transformers loads, which draws a bar by itself."""
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    hawqtool.measure(place / "model", place / "sampled.json", bits=[4, 8], **SETTINGS)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_written_folders_are_evaluated_and_verified(result: hawqtool.Result, place: Path) -> None:
    found = hawqtool.evaluate(result.folder, place / "model", place / "other.txt", **SETTINGS)
    assert found["quantized"]["kl"] > 0
    assert hawqtool.verify(str(result.folder), place / "model").problems == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_bwp": 4}, "did you mean 'target_bpw'"),
        ({"target_bpw": "many"}, "target_bpw"),
        ({}, "exactly one of --target-bpw"),
        ({"target_bpw": 4, "bits": [1]}, "bits"),
    ],
)
def test_settings_are_checked_as_those_of_the_command(place: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(hawqtool.HawqError, match=message):
        hawqtool.quantize(place / "model", place / "none", **values)
    assert not (place / "none").exists()


def test_the_example_of_the_page_runs(place: Path, tmp_path: Path) -> None:
    """In a process of its own, which shows that nothing else is printed."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M | re.S)
    for name in ("model", "text.txt", "other.txt"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "example.py").write_text("\n".join(blocks))
    program = "import sys, runpy; sys.path.insert(0, sys.argv[1]); runpy.run_path('example.py')"
    found = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0 and found.stderr == "", found.stderr
    lines = found.stdout.splitlines()
    stages = [line for line in lines if line.endswith(": done")]
    assert len(stages) > 3 and lines[len(stages)].endswith(found.stdout.split("bits per weight, ")[1].splitlines()[0])
    assert re.fullmatch(r"first layer: [248] bits", lines[len(stages) + 1])
    assert lines[-3].startswith("4.5: predicted loss") and lines[-2].startswith("6: predicted loss")
    assert lines[-1].startswith("UsageError: target of 1.5")
