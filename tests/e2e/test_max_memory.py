"""A limit of memory changes where hidden states lie, never a result."""

from __future__ import annotations

from typing import Any

import pytest

from hawqtool.export.manifest import weight_hashes
from hawqtool.streaming.offload import DISK, FOLDER_PREFIX
from tests.support.runs import Run, read


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rounding": "foem", "foem_beta": "auto", "target_shift": "auto"},  # held-out rows, and the original's states
        {"refine_steps": 2},
    ],
    ids=["plain", "held out and shifted", "refined"],
)
def test_a_limit_changes_no_result(run: Run, more: dict[str, Any]) -> None:
    settings = {"bits": "2,3,4,8", "target_bpw": 5.0, "batch_size": 4, "shortlist": 1, **more}
    (free, unlimited), (small, limited) = run(**settings), run(**settings, max_memory="1KiB")
    assert weight_hashes(free) == weight_hashes(small) != {}
    assert read(free / "reproduce/checksums.json") == read(small / "reproduce/checksums.json")
    assert read(free / "reproduce/sensitivity.json")["scores"] == read(small / "reproduce/sensitivity.json")["scores"]
    assert limited["config"]["max_memory"] == "1KiB"
    assert limited["peak_memory_bytes"][f"hidden states ({DISK})"] > 0
    assert not any(DISK in name for name in unlimited["peak_memory_bytes"])
    assert not list(small.parent.rglob(f"{FOLDER_PREFIX}*"))
