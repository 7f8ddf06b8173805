"""Do the tests notice errors? Plants known ones in a copy of the tree, one at a time, and runs their tests.

Every error of `planted_errors` takes the place of the right text in a copy of the tracked files; the tests named with
it must fail then. First all these tests run on the copy as it is, where they must pass. Prints one line for each
error; the exit code is 1 if one survives.

    python scripts/soak/mutants.py                  # all, about five minutes on one core
    python scripts/soak/mutants.py --only perplexity --only HiGHS
    python scripts/soak/mutants.py --list
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from planted_errors import PLANTED, PlantedError

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other says that it did not run the tests."""


def main() -> int:
    """Plant, run, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="errors whose name holds this text")
    parser.add_argument("--list", action="store_true", help="names of the errors, and nothing run")
    options = parser.parse_args()
    chosen = [error for error in PLANTED if not options.only or any(text in error.name for text in options.only)]
    if not chosen:
        parser.error(f"no planted error has {' or '.join(options.only)} in its name; see --list")
    if options.list:
        print("\n".join(error.name for error in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="hawqtool-mutants-") as place:
        tree = copy_tree(Path(place) / "tree")
        code, tail = run_tests(tree, sorted({test for error in chosen for test in error.tests}))
        if code != PASSED:
            print(f"the tests fail on the tree as it is; mend that first:\n{tail}")
            return 1
        survived = [error for error in chosen if not is_caught(tree, error)]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} planted errors were caught")
    return 1 if survived else 0


def copy_tree(target: Path) -> Path:
    """A copy of the files that git knows, as they are now; tests that look at the repository find one."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, names)):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def is_caught(tree: Path, error: PlantedError) -> bool:
    """Plant one error, run its tests, and put the right text back."""
    path, begun = tree / error.path, time.monotonic()
    right = path.read_text(encoding="utf-8")
    path.write_text(planted(error, right), encoding="utf-8")
    try:
        code, tail = run_tests(tree, error.tests)
    finally:
        path.write_text(right, encoding="utf-8")
    if code not in (PASSED, FAILED):
        raise SystemExit(f"{error.name}: pytest ended with {code}, the tests did not run:\n{tail}")
    verdict = "caught  " if code == FAILED else "SURVIVED"
    print(f"{verdict}  {error.name} ({error.path}, {time.monotonic() - begun:.0f} s)", flush=True)
    return code == FAILED


def planted(error: PlantedError, text: str) -> str:
    """The text of a file with the error in it.

    Raises:
        ValueError: If what the error replaces does not occur exactly once: then the list is out of date.
    """
    if text.count(error.right) != 1:
        raise ValueError(
            f"{error.name}: {error.path} has {error.right!r} {text.count(error.right)} times, expected once"
        )
    return text.replace(error.right, error.wrong)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code of pytest, and the end of what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, "\n".join(done.stdout.splitlines()[-15:])


if __name__ == "__main__":
    sys.exit(main())
