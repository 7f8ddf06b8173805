"""Rates of the machine are measured for every rounding, on what the run will do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.search import rates
from tests.support.runs import place, settings  # noqa: F401


@pytest.mark.parametrize(
    "options",
    [
        {"bits": "2,4", "target_bpw": 4.0},
        {"bits": "3", "rounding": "rtn", "calibration": "self", "num_samples": None, "seq_len": None,
         "eval_samples": None},
        {"bits": "4", "rounding": "foem", "foem_beta": "auto", "target_shift": "auto", "scale_refit": True},
        {"bits": "4", "rounding": "gptaq", "token_importance": "none"},
        {"formats": "hopper", "group_size": None, "target_bpw": 9.0},
    ],
    ids=lambda options: options.get("rounding", options.get("formats", "gptq")),
)  # fmt: skip
def test_rounding_is_tried_as_the_run_does_it(
    place: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    job, rounded = prepare(settings(place, **options)), list[Any]()
    for name in ("round_layers", "round_without_inputs"):
        known = getattr(rates, name)
        monkeypatch.setattr(rates, name, lambda *given, known=known: rounded.append(given[-1]) or known(*given))
    torch.set_default_dtype(torch.bfloat16)  # as transformers does for a moment, which may load a model meanwhile
    try:
        found = rates.measured_rates(job)
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0 < found.rounded < math.inf and 0 < found.operations < math.inf
    assert found.read == math.inf  # a tiny model says nothing of reading
    assert set(rounded) == {job.settings.method} and len(rounded) >= 2
