"""Settings of the command's tests."""

import pytest

from hawqtool.pipeline import quantize


@pytest.fixture
def page() -> None:
    """Asked for by tests of the page that a run leaves."""


@pytest.fixture(autouse=True)
def no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no page where none is asked for: it takes longer than all else of a tiny run."""
    if "page" not in request.fixturenames:
        monkeypatch.setattr(quantize, "write_page", lambda *_: None)
