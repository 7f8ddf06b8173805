"""Streams that cannot take everything: narrow encodings, readers that are gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_llama

HAWQTOOL = (sys.executable, "-m", "hawqtool")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("streams") / "modèle ±→☃")


@pytest.mark.parametrize("arguments", [("--help",), ("inspect",), ("inspect", "--json"), ("verify",)])
def test_an_ascii_terminal_gets_plain_characters(model: Path, arguments: tuple[str, ...]) -> None:
    given = (*HAWQTOOL, *arguments, *([] if arguments == ("--help",) else [model]))
    done = subprocess.run(given, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == (4 if arguments == ("verify",) else 0), done.stderr
    assert b"Traceback" not in done.stderr
    if arguments == ("inspect",):
        assert b"modele +-->\\u2603" in done.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("quantize", "--help"), ("inspect",), ("inspect", "--json")])
def test_a_reader_that_is_gone_ends_in_141(model: Path, arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    given = (*HAWQTOOL, *arguments, *([] if "--help" in arguments else [model]))
    done = subprocess.run(given, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
