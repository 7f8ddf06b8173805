"""``hawqtool report``, and the page that ``quantize`` leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from hawqtool.cli.app import app
from tests.support.tiny import tiny_llama

SMALL = ("--num-samples", "8", "--seq-len", "16", "--group-size", "32", "--device", "cpu", "--eval-samples", "4")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=1200)))
    tiny_llama(folder / "model")
    return folder


def quantize(place: Path, output: Path, *options: object) -> Result:
    text = place / "text.txt"
    return invoke("quantize", place / "model", "-o", output, "--calibration", text, *SMALL, *options)


@pytest.mark.usefixtures("page")
def test_quantize_leaves_the_page_that_report_draws(place: Path, tmp_path: Path) -> None:
    out, plots = tmp_path / "out", tmp_path / "plots"
    assert quantize(place, out, "--bits", "2,4,8", "--target-bpw", "5").exit_code == 0
    first = (out / "report.html").read_bytes()
    again = invoke("report", out, "--plots", plots, "--json")
    assert again.exit_code == 0, again.stderr
    files = json.loads(again.stdout)["files"]
    assert files[0] == str(out / "report.html") and len(files) == 9 and all(Path(f).is_file() for f in files)
    assert (out / "report.html").read_bytes() == first
    assert invoke("verify", out).exit_code == 0


@pytest.mark.parametrize("name", ["nowhere", "model"])
def test_a_folder_that_is_not_ours_exits_4_with_one_line(place: Path, name: str) -> None:
    result = invoke("report", place / name)
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1 and "report.json" in result.stderr
    assert not (place / name / "report.html").exists()
