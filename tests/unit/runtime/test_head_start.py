"""Libraries are imported ahead where there is a GPU to compute on, and nothing is where there is none."""

from __future__ import annotations

import pytest

from hawqtool.runtime import head_start
from hawqtool.runtime.background import beside


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


def test_what_fails_ahead_is_told_by_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    head_start.wake()  # also where there is no GPU
    head_start._import_all(("no_such_library.part", "json"))
    with pytest.raises(ModuleNotFoundError):
        beside(lambda: head_start._import_all(("json.none",)))()
    assert capfd.readouterr().err == ""
