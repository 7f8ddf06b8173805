"""scripts/soak/fuzz.py in small: every target, every limit; the real run has 100,000 inputs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/soak"
TARGETS = (
    "header", "shard_index", "run_config", "batch", "any_yaml", "model_config", "plan", "sensitivity", "costs",
    "card",
)  # fmt: skip


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("hypothesis")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import fuzz

    return fuzz


def test_all_targets_are_listed(fuzz: Any) -> None:
    from fuzzing.strategies import STRATEGIES, seeds
    from fuzzing.targets import TARGETS as found

    assert tuple(found) == tuple(STRATEGIES) == tuple(seeds()) == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_takes_some_inputs_and_fails_on_none(fuzz: Any, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    # Files of a batch are large; the limit of a real run is for a machine that does nothing else.
    monkeypatch.setattr(fuzz, "SECONDS_PER_INPUT", 600.0)
    # Inputs that are all refused at the first check would prove little.
    assert fuzz.fuzz_with_hypothesis(target, 20 if target == "batch" else 150, 1, memory=False) > 0


def test_the_guard_stops_what_it_must(fuzz: Any, tmp_path: Path) -> None:
    from fuzzing.limits import FileGuard, LimitExceededError, watched

    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("x")
    guard = FileGuard(inside)
    with watched(guard, 600):
        (inside / "a").write_text("x")
        (inside / "a").read_text()
    forbidden = (
        outside.read_text,
        lambda: outside.write_text("y"),
        lambda: (inside / "../outside").read_text(),
        lambda: outside.rename(inside / "b"),
        outside.unlink,
        lambda: (tmp_path / "new").mkdir(),
        lambda: subprocess.run(["true"], check=False),
    )
    for action in forbidden:
        with pytest.raises(LimitExceededError), watched(guard, 600):
            action()
    with pytest.raises(LimitExceededError, match=r"0\.2 s"), watched(guard, 0.2):
        time.sleep(2)
    assert outside.read_text() == "x"


def test_the_bound_on_memory_holds() -> None:
    program = "from fuzzing.limits import bound_memory; bound_memory(1 << 28); x = bytearray(1 << 30)"
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "MemoryError" in done.stderr
