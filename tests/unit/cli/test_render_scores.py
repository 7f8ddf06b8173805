"""Tables of scores and plans."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hawqtool.cli.render_scores import print_plan, print_scores
from hawqtool.report.documents import PlanDocument, SensitivityDocument


def test_the_most_and_least_sensitive_units_are_shown_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    by_unit = {
        f"model.layers.{n}.self_attn.qkv_proj": {"w4g64": [9.0, 1.0], "w2g64": [n + 0.5, 0.1]} for n in range(30)
    }
    document: Any = {"scores": {"fisher": by_unit, "kron": {}}}
    print_scores(cast(SensitivityDocument, document))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "score fisher" in out and "18 more" in out
    shown = [line.split()[1] for line in out.splitlines() if "qkv_proj" in line]
    assert shown == [f"{n}.self_attn.qkv_proj" for n in (*range(29, 21, -1), *range(3, -1, -1))]
    assert "2.95e+01" in out and "w4g64" not in out


def test_a_plan_is_counted_by_role(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    layers = [
        {"name": f"model.layers.{n}.mlp.{part}", "bits": 8 if part == "down_proj" and n < 2 else 4, "bytes": 1000}
        for n in range(5)
        for part in ("up_proj", "down_proj")
    ]
    print_plan(cast(PlanDocument, {"layers": layers}))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "proj" in line]
    assert [line[1:-1:2] for line in lines] == [["mlp.up_proj", "5", "│"], ["mlp.down_proj", "3", "2", "5,000"]]
