"""Libraries are imported ahead where there is a GPU to compute on, and nothing is where there is none."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers import utils

from hawqtool.runtime.background import beside
from hawqtool.runtime.imports import head_start


def test_a_head_start_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[object]()
    monkeypatch.setattr(head_start, "beside", begun.append)
    monkeypatch.setattr(head_start, "_DRIVER", "libnone.so.0")
    head_start.head_start("auto")
    assert not begun
    monkeypatch.setattr(head_start, "_DRIVER", "libc.so.6")
    head_start.head_start("cpu")
    assert not begun
    head_start.head_start("auto")
    assert len(begun) == 3


def test_scikit_learn_is_left_out_of_what_models_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = list[bool]()
    monkeypatch.setattr(utils, "is_sklearn_available", lambda: True)

    def look(name: str) -> ModuleType:
        if name == head_start._GENERATION:
            answers.append(utils.is_sklearn_available())
        return import_module(name)

    monkeypatch.setattr(head_start, "import_module", look)
    head_start._import_generation()
    assert answers == [False] and utils.is_sklearn_available()


def test_triton_is_asked_for_what_it_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    class Active:
        @property
        def utils(self) -> None:
            asked.append("utils")

    known = {
        head_start._TRITON: SimpleNamespace(triton_key=lambda: asked.append("key")),
        head_start._TRITON_RUNTIME: SimpleNamespace(driver=SimpleNamespace(active=Active())),
    }
    monkeypatch.setattr(head_start, "import_module", known.__getitem__)
    head_start._wake_triton()
    assert asked == ["key", "utils"]


def test_libraries_that_are_not_there_are_not_opened(tmp_path: Path) -> None:
    head_start._open_library(tmp_path / "libnone.so")
    with pytest.raises(OSError):
        (tmp_path / "libbad.so").write_text("no library")
        head_start._open_library(tmp_path / "libbad.so")


def test_what_fails_ahead_is_told_by_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    head_start.wake()  # also where there is no GPU
    head_start._import_all(("no_such_library.part", "json"))
    with pytest.raises(ModuleNotFoundError):
        beside(lambda: head_start._import_all(("json.none",)))()
    assert capfd.readouterr().err == ""
