"""The list of planted errors fits the tree: each text is there once, and so are the tests meant for it."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"allocation", "checkpoint", "cli", "evaluation", "export", "pipeline", "rounding", "sensitivity"}


def test_every_error_can_be_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a line that an error replaces changes `scripts/soak/planted_errors.py` too."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts/soak"))
    mutants = importlib.import_module("mutants")
    errors = importlib.import_module("planted_errors").PLANTED
    for error in errors:
        ast.parse(mutants.planted(error, (ROOT / error.path).read_text(encoding="utf-8")), error.path)
        for test in error.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}(" in text or not name, f"{error.name}: {test}"
    assert max(Counter(error.name for error in errors).values()) == 1
    assert len(errors) >= 35 and {error.path.split("/")[1] for error in errors} >= PACKAGES
