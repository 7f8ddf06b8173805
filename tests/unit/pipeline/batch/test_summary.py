"""What a batch's table holds for a spreadsheet."""

from __future__ import annotations

from typing import Any

import pytest

from hawqtool.pipeline.batch.summary import _cell


@pytest.mark.parametrize(
    ("value", "expected"),
    [("=1+1", "'=1+1"), ("@x", "'@x"), ("-x", "'-x"), ("a=b", "a=b"), (-1.5, -1.5), (None, None), ("", "")],
)
def test_a_text_is_no_formula(value: Any, expected: Any) -> None:
    assert _cell(value) == expected
