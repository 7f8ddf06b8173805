"""Tables of a batch on narrow and on wide terminals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hawqtool.cli.render_batch import dry_run_table, summary_table

ROW: dict[str, Any] = {
    "name": "Llama-3.2-1B-3.5bpw",
    "status": "gate failed",
    "ran": True,
    "exit_code": 3,
    "bpw_linears": 3.4971,
    "quantized_bytes": 987_654_321,
    "measure": "kl",
    "divergence": 0.12345,
    "divergence_stderr": 0.00123,
    "uniform_divergence": 0.2,
    "measurement": "shared",
    "seconds": 1234.5,
    "error": "max_kl 0.1: found 0.1234",
}


@pytest.mark.parametrize("width", [80, 120, 150])
def test_tables_fit_and_break_no_word(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    counts = {"ran": 1, "measured": 1, "exit_code": 3}
    summary_table({"jobs": [ROW], "models": [], **counts}, Path("runs"))
    dry = {"name": ROW["name"], "target": "3.5 bpw", "rounding": "gptq", "status": "to do", "error": "a note"}
    dry_run_table([dry | {"original_bytes": 2_000_000_000, "quantized_bytes": 987_654_321}])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    for word in (ROW["name"], "gate failed", "3.497", "987.7 MB", "0.123 ± 0.0012", "found 0.1234", "a note"):
        assert word in out, word
    assert ("uniform" in out) == (width > 120)
