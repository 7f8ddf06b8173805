"""Patterns of a foreign config: many are matched fast, endless ones are stopped."""

from __future__ import annotations

import time

import pytest

from hawqtool.export import config_checks
from hawqtool.export.compressed_tensors import quantization_config
from hawqtool.export.config_checks import matching_problems, target_problems
from hawqtool.formats import QuantFormat

MODULES = [f"model.layers.{n}.fc" for n in range(40)]


def test_a_pattern_without_end_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "MATCHING_SECONDS", 0.3)
    formats = {name: QuantFormat(4, 32) for name in MODULES}
    config = quantization_config(formats, {name: name for name in MODULES}, [], {})
    assert matching_problems(config, MODULES) == []
    config["ignore"] = [r"re:(\w+\.?)+!"]
    (problem,) = matching_problems(config, ["model.layers.0." + "a" * 60])
    assert "no end after 0.3" in problem and "nested repeats" in problem


def test_thousands_of_targets_take_seconds() -> None:
    targets = [rf"re:.*\.layers\.({n})\.fc$" for n in range(20_000)]
    config = {"config_groups": {"w4g32": {"targets": targets}}, "ignore": []}
    start = time.process_time()
    assert matching_problems(config, MODULES) == []
    assert len(target_problems(config, MODULES)) == 20_000 - len(MODULES)
    assert time.process_time() - start < 60  # compiled once; for each name anew it would be half an hour
