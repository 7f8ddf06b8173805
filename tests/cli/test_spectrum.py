"""``hawqtool inspect --spectrum``: bounded by flags, figures, one-line errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from hawqtool.cli.app import app
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spectrum")
    tiny_llama(folder / "model")
    words = random.Random(0)
    (folder / "text.txt").write_text(" ".join(str(words.random()) for _ in range(2000)))
    return folder


def inspect(place: Path, *options: object) -> Result:
    fixed = ("--calibration", place / "text.txt", "--seq-len", 16, "--device", "cpu")
    return CliRunner().invoke(app, ["inspect", str(place / "model"), *map(str, (*fixed, *options))])


SMALL = ("--spectrum", "--rows", 2, "--iterations", 4, "--starts", 2, "--group-size", 32)


def test_it_measures_what_the_flags_say(place: Path) -> None:
    result = inspect(place, *SMALL, "--width", 4, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["spectrum"]
    assert (found["rows"], found["iterations"], found["starts"]) == (2, 4, 2)
    assert len(found["nodes"]) == 2 and len(found["nodes"][0]) == 4
    loss = found["loss"]
    assert loss["formats"] == ["w4g32"] and loss["rounding"] == "rtn" and loss["measure"] == "kl"
    assert {0, 0.25, 0.5, 0.75, 1, 1.25} <= set(loss["scales"]) and loss["divergence"][0] == 0
    assert len(loss["scales"]) == len(loss["divergence"]) == len(loss["stderr"])
    assert loss["divergence"][1] == pytest.approx(loss["scales"][1] ** 2 * loss["quadratic"], rel=0.2)


def test_compensated_rounding_loses_less(place: Path) -> None:
    losses = {}
    for rounding in ("rtn", "gptq"):
        result = inspect(place, *SMALL, "--rounding", rounding, "--num-samples", 8, "--json", "--quiet")
        assert result.exit_code == 0, result.output
        losses[rounding] = json.loads(result.stdout)["spectrum"]["loss"]
    assert losses["gptq"]["rounding"] == "gptq"
    assert losses["gptq"]["quadratic"] < losses["rtn"]["quadratic"]


def test_for_people_with_figures(place: Path, tmp_path: Path) -> None:
    result = inspect(place, *SMALL, "--plots", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    assert "½ DᵀFD" in result.stdout and "KL in nats per output at W + a D" in result.stdout
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["density.png", "eigenvalues.png", "loss.png"]
    for name in names:
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stdout
    assert "spectrum: 8/8" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--plots", "figures"), 2, "--plots draws what --spectrum measures"),
        (("--spectrum", "--plots", "no/such/parent"), 2, "parent folder"),
        (("--spectrum", "--rounding", "best"), 2, "rounding"),
        (("--spectrum", "--rows", 4000), 4, "rows of 16 tokens"),
        (("--spectrum", "--iterations", 1), 2, "--iterations"),
        (("--spectrum", "--width", 9), 2, "--width"),
    ],
)
def test_wrong_use_is_refused(place: Path, options: tuple[object, ...], code: int, said: str) -> None:
    result = inspect(place, *options)
    assert result.exit_code == code and said in result.stderr, result.output
