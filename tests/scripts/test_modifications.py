"""The table of docs/security.md says what verify finds: a sample of its kinds is tried again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 9
"""Every ninth kind is tried, which meets all groups; the script tries all of them in half a minute."""


@pytest.fixture(scope="module")
def modifications() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts/soak"))
        import modifications

        yield modifications


def test_a_sample_is_found_as_the_page_says(modifications: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    source, clean = modifications.build(tmp_path)
    assert not modifications.has_problem(clean, source)
    for kind in modifications.kinds()[::SAMPLE]:
        found = modifications.tried(kind, source, clean, tmp_path / "out")
        marks = " | ".join("found" if mark else "no" for mark in found)
        assert f"| {kind.name} | {marks} | {'' if found[2] else kind.note} |" in page, kind.name


def test_the_page_has_every_kind_and_a_reason_for_what_is_missed(modifications: Any) -> None:
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    table = page.split(modifications.BEGIN)[1].split(modifications.END)[0]
    kinds = modifications.kinds()
    assert len(kinds) >= 95 and f"Of {len(kinds)} kinds" in table
    assert not [name for name, count in Counter((k.group, k.name) for k in kinds).items() if count > 1]
    for kind in kinds:
        row = next(line for line in table.splitlines() if line.startswith(f"| {kind.name} | "))
        _, _, forged, note = [cell.strip() for cell in row.strip("|").split("|")][1:]
        assert forged == "found" or note, kind.name
