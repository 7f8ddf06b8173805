"""Streams that cannot take everything: narrow encodings, readers that are gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked import Forks
from tests.support.tiny import tiny_llama

HAWQTOOL = (sys.executable, "-m", "hawqtool")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("streams") / "modèle ±→☃")


@pytest.mark.parametrize("arguments", [("--help",), ("inspect",), ("inspect", "--json"), ("verify",)])
def test_an_ascii_terminal_gets_plain_characters(model: Path, forks: Forks, arguments: tuple[str, ...]) -> None:
    done = forks.run(*arguments, *([] if arguments == ("--help",) else [model]), encoding="ascii")
    assert done.returncode == (4 if arguments == ("verify",) else 0), done.stderr
    assert "Traceback" not in done.stderr
    if arguments == ("inspect",):
        assert "modele +-->\\u2603" in done.stdout


def test_the_installed_command_on_an_ascii_terminal() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*HAWQTOOL, "--help"], capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.isascii(), done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("inspect",), ("inspect", "--json")])
def test_a_reader_that_is_gone_ends_in_141(model: Path, forks: Forks, arguments: tuple[str, ...]) -> None:
    done = forks.run(*arguments, *([] if "--help" in arguments else [model]), reader=False)
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_the_installed_command_ends_in_141_as_well() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*HAWQTOOL, "quantize", "--help"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
