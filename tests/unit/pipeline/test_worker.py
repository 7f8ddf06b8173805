"""What begins and ends the processes of a run; they themselves are tried in tests/cli/test_ranks.py."""

from __future__ import annotations

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.pipeline.worker import leading
from hawqtool.runtime.ranks import ALONE


def test_several_gpus_are_not_promised_by_one_process() -> None:
    with (
        pytest.raises(UsageError, match="gpus is 2, but this is one process alone"),
        leading(RunConfig(model="m", gpus=2)),
    ):
        pass


def test_one_process_leads_itself() -> None:
    with leading(RunConfig(model="m", device="cpu")) as others:
        assert others.joined() is ALONE
