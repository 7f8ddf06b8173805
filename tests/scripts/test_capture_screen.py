"""A live run on a narrow terminal: bars keep to its width and lose neither steps nor the time that is left."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.runs import random_text
from tests.support.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from capture_screen import capture  # noqa: E402

BAR = re.compile(r"phase (\d+) of (\d+), .*?…? [━╸╺ ]+ (\d+)/(\d+) (?:\d:\d\d:\d\d )?.+ left in all")


def test_bars_fit_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_llama(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(random_text(1, 3000))
    for name, value in {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HAWQTOOL_LOAD_TRIAL": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    command = [sys.executable, "-m", "hawqtool", "quantize", str(model), "-o", str(tmp_path / "out"), "--bits", "4"]
    options = ["--calibration", str(text), "--num-samples", "8", "--seq-len", "16", "--eval-samples", "4"]
    found = capture([*command, *options, "--group-size", "32"], 70)
    shown = "\n".join(line for _, line in found.frames)
    assert found.code == 0, shown
    bars = [line for _, line in found.frames if line.startswith("phase ")]
    assert all(len(line) <= 70 for _, line in found.frames), shown
    positions = [int(match[1]) for line in bars if (match := BAR.fullmatch(line))]
    total = int(BAR.fullmatch(bars[-1])[2])  # type: ignore[index]
    assert positions == sorted(positions) and positions[-1] == total
    assert set(positions) == set(range(1, total + 1)), shown
