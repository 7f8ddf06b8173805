"""The page of the documents is made from their types, and the check that compares the two can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hawqtool.report.documents import ErrorDocument
from hawqtool.report.schema import Gate, Report
from tests.support.conformity import differences

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def schema_page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import schema_page

    return schema_page


def test_the_page_is_current(schema_page: Any) -> None:
    page = schema_page.PAGE.read_text(encoding="utf-8")
    assert page == schema_page.page(), "run python scripts/schema_page.py"


def test_every_key_stands_on_the_page_with_its_meaning(schema_page: Any) -> None:
    page = schema_page.page()
    for name, (_, meaning, _) in schema_page.keys(Report).items():
        assert f"| `{name}` |" in page and meaning.endswith(".")
    assert set(schema_page.keys(Report)) == set(get_type_hints(Report))


GATE = {"name": "max_kl", "sense": "at most", "limit": 0.1, "found": 1, "passed": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"baseline": 0.5}, []),
        ({"other": 1}, ["document.other is unknown"]),
        ({"limit": "much"}, ["document.limit: 'much' is no <class 'float'>"]),
        ({"limit": True}, ["document.limit: True is no <class 'float'>"]),
    ],
)
def test_differences_are_found(change: dict[str, Any], said: list[str]) -> None:
    assert differences(GATE | change, Gate) == said


def test_missing_keys_and_wrong_literals_are_found() -> None:
    assert differences({"schema": "hawqtool.error/2", "error": ""}, ErrorDocument) == [
        "document.exit_code is missing",
        "document.schema: 'hawqtool.error/2'",
    ]
