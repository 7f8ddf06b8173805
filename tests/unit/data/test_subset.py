"""Some of the calibration rows, with what belongs to them."""

from __future__ import annotations

import torch

from hawqtool.data.subset import some_count, some_rows
from hawqtool.data.tokens import fingerprint
from hawqtool.records import Rows


def test_rows_of_a_comparison_keep_their_importance() -> None:
    tokens = torch.arange(128)[:, None].expand(128, 4)
    rows = Rows(tokens, "test", "-", {"a": tokens.float()})
    found = some_rows(rows)
    assert found.fingerprint == fingerprint(found.tokens) and some_count(128) == 32
    assert len(found.tokens) == 32 and found.importance is not None
    assert torch.equal(found.importance["a"], found.tokens.float())
    assert len(some_rows(Rows(tokens[:40], "test", "-")).tokens) == 40
