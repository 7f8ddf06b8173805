"""Do the tests notice errors? Plants known ones in a copy of the tree, one at a time, and runs their tests.

Every error of `planted_errors` takes the place of the right text in a copy of the tracked files; the tests named with
it must fail then. First all these tests run on the copy as it is, where they must pass. Prints one line for each
error; the exit code is 1 if one survives.

    python scripts/soak/mutants.py                  # all, about four minutes on one core
    python scripts/soak/mutants.py --only perplexity --only HiGHS
    python scripts/soak/mutants.py --list
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from planted_errors import PLANTED, PlantedError

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, INTERNAL_ERROR = 0, 1, 3
"""Exit codes of pytest; any other than these says that it did not find the tests."""

LIBRARIES = ("torch", "transformers", "scipy.optimize", "numba", "safetensors.torch", "typer")
"""What is imported once: every run of tests is a fork of this process."""


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
    for name in LIBRARIES:
        importlib.import_module(name)
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
    log = tree.parent / "log"
    process = os.fork()
    if process == 0:
        _child(tree, tests, log)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def _child(tree: Path, tests: Sequence[str], log: Path) -> NoReturn:
    """Run pytest on the copy in this fork, which has the libraries and nothing of the project."""
    code = INTERNAL_ERROR
    try:
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)  # of processes that tests start
        sys.path[0] = str(tree)
        sys.dont_write_bytecode = True
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
