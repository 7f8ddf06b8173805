"""scripts/soak/bit_flips.py in small: the real run has 500 flips."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_flips_are_found_and_mended(tmp_path: Path) -> None:
    options = ["--only", "plain", "--flips", "2", "--cuts", "1"]
    command = [sys.executable, str(ROOT / "scripts/soak/bit_flips.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("every run gave what the undisturbed one gives")
