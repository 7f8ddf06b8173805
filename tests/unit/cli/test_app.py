"""How the process ends."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from hawqtool.cli.app import _is_watched


def test_profilers_of_later_pythons_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    for names, watched in (({}, False), ({2: "cProfile"}, True)):
        monkeypatch.setattr(sys, "monitoring", SimpleNamespace(get_tool=names.get), raising=False)
        assert _is_watched() is watched
    monkeypatch.delattr(sys, "monitoring")
    assert not _is_watched()
