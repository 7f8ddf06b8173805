"""A limit of memory changes where hidden states lie, never a result."""

from __future__ import annotations

from hawqtool.model.spill import DISK
from tests.e2e.runs import Run, read


def test_a_limit_changes_no_result(run: Run) -> None:
    settings = {"bits": "2,3,4,8", "target_bpw": 5.0, "rows_per_slice": 4, "shortlist": 1}
    (free, unlimited), (small, limited) = run(**settings), run(**settings, max_memory="1KiB")
    for name in ("sha256.json", "checksums.json"):
        assert read(free / "reproduce" / name) == read(small / "reproduce" / name), name
    assert read(free / "reproduce/sensitivity.json")["scores"] == read(small / "reproduce/sensitivity.json")["scores"]
    assert limited["config"]["max_memory"] == "1KiB"
    assert limited["peak_memory_bytes"][f"hidden states ({DISK})"] > 0
    assert not any(DISK in name for name in unlimited["peak_memory_bytes"])
    assert not list(small.parent.glob(".hawqtool-states-*"))
