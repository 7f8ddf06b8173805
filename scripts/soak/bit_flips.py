"""Flip one bit in what unfinished runs have saved, run them again, and compare with runs that nobody disturbed.

Tiny models are quantized in five ways (plain, on rows sampled from the model, refined, distilled, with width swaps).
Each run is cut at moments spread over its work; then, in a copy of its private folder, one bit of one file is flipped
and the run goes on. Nothing may be silent (other weights, plan, scores or figures than those of the undisturbed run),
nothing may end in a traceback, and no more may be lost than the damaged part: what is done again beyond that is
counted as deleted too much.

    PYTHONPATH=. python scripts/soak/bit_flips.py [--flips 500] [--cuts 10] [--seed 0] [--only distilled]

500 flips take about ten minutes on one idle core. The exit code is 1 where a trial fails.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hawqtool.config import RunConfig
from hawqtool.errors import HawqError
from hawqtool.export.manifest import file_hash
from hawqtool.parsing import load_json
from hawqtool.pipeline import quantize
from hawqtool.pipeline.load_trial.trial import SWITCH
from hawqtool.pipeline.run.checkpoints import SUFFIX, Checkpoints
from hawqtool.rounding.learned import training
from hawqtool.runtime.reporter import Silent
from hawqtool.streaming import resume_points
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"bits": "4", "target_bpw": 4.5},
    "self rows": {"bits": "4", "target_bpw": 4.5, "calibration": ("self",)},
    "refined": {"bits": "2,4", "target_bpw": 4.0, "refine_steps": 4, "sensitivity_steps": 2, "shortlist": 1},
    "distilled": {"bits": "3", "target_bpw": 3.5, "refine_steps": 2, "distill_steps": 4},
    "swaps": {"bits": "2,4,8", "target_bpw": 5.0, "shortlist": 2, "swaps": 1},
}
SILENT, TRACEBACK, TOO_MUCH, REFUSED = "silent", "traceback", "deleted too much", "refused"
FAULTS = (SILENT, TRACEBACK, TOO_MUCH, REFUSED)
MENDED, HARMLESS = "said and mended", "of no effect"

_TIMES = re.compile(r"seconds|timings|^starts$|^manifest$|^peak_memory_bytes$|^warnings$|^command$|^output$")
_AGAIN = re.compile(
    r"(^|\.)(timings|identity|rows|starts|shipped|reverse-sweep|standing)$|walk\.|\.states\.|\.evaluating\."
)
"""Keys that a run which goes on may save again: notes, and states on the way to a result, which is a key of its own."""


class _Cut(BaseException):
    """Ends a run as a signal does."""


@dataclass
class Trial:
    """A run that goes on: how it ended, what it told, and which keys it saved."""

    outcome: dict[str, Any] | None = None
    error: str = ""
    refused: bool = False
    warnings: list[str] = field(default_factory=list)
    saved: set[str] = field(default_factory=set)


class Noting(Silent):
    """Keeps warnings."""

    def __init__(self, warnings: list[str]) -> None:
        super().__init__()
        self.noted = warnings

    def warn(self, text: str) -> None:
        """Note a warning."""
        self.noted.append(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Cut, flip, go on, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=500, help="flips in all, the same number for each kind of run")
    parser.add_argument("--cuts", type=int, default=10, help="moments at which a run of each kind is cut")
    parser.add_argument("--seed", type=int, default=0, help="seed of files and bits")
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds of runs")
    options = parser.parse_args(arguments)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", SWITCH: "0", "TQDM_DISABLE": "1"}
    quantize.write_page = lambda *_: None
    resume_points.LEAST_SECONDS = 0.0  # so that the walks of a tiny model keep their states too
    training.BYTES_PER_SECOND = math.inf
    kinds, generator = options.only or list(KINDS), random.Random(options.seed)
    columns = (MENDED, HARMLESS, *FAULTS)
    print(f"{'kind':>10}  flips  " + "  ".join(columns), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="hawqtool-flips-") as place:
        bench = Bench(Path(place))
        for number, kind in enumerate(kinds):
            flips = options.flips * (number + 1) // len(kinds) - options.flips * number // len(kinds)
            failures: list[str] = []
            counts = bench.flip_all(kind, flips, options.cuts, generator, failures)
            cells = "  ".join(f"{counts[name]:>{len(name)}}" for name in columns)
            print("\n".join([f"{kind:>10}  {flips:>5}  {cells}", *failures]), flush=True)
            failed += len(failures)
    print(f"{failed} failed" if failed else "every run gave what the undisturbed one gives, and lost one part at most")
    return int(bool(failed))


class Bench:
    """A model, a text, and runs on them.

    Args:
        place: Empty folder.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.model, self.text = place, place / "model", place / "text.txt"
        tiny_llama(self.model)
        self.text.write_text(random_text(1, 3000))

    def config(self, kind: str, folder: Path) -> RunConfig:
        """Settings of a run of some kind into ``folder/out``."""
        values: dict[str, Any] = {"model": str(self.model), "calibration": (str(self.text),), "device": "cpu"}
        values |= {"num_samples": 8, "seq_len": 16, "eval_samples": 4, "group_size": 32}
        return RunConfig(**(values | KINDS[kind] | {"output": str(folder / "out")}))

    def flip_all(self, kind: str, flips: int, cuts: int, generator: random.Random, failures: list[str]) -> Counter[str]:
        """Verdicts on so many flips in runs of a kind; adds a line for each failure."""
        counts: Counter[str] = Counter()
        expected = self.go_on(kind, self.folder("undisturbed")).outcome
        assert expected is not None
        for number, (snapshot, redone) in enumerate(self.snapshots(kind, cuts, expected)):
            for _ in range(flips * (number + 1) // cuts - flips * number // cuts):
                folder = self.place / "trial"
                shutil.copytree(snapshot, folder)
                path, bit = flip_a_bit(folder, generator)
                verdict, said = judge(self.go_on(kind, folder), expected, path, redone)
                counts[verdict] += 1
                if verdict in FAULTS:
                    failures.append(f"{kind}, cut {number}, bit {bit} of {path}: {verdict}: {said}")
                shutil.rmtree(folder)
        return counts

    def snapshots(self, kind: str, cuts: int, expected: dict[str, Any]) -> Iterator[tuple[Path, set[str]]]:
        """Folders of runs that were cut, and the keys that each saves when it goes on undamaged."""
        whole = self.folder("whole")
        with counted_saves() as keys:
            quantize.run_quantize(self.config(kind, whole), "hawqtool quantize", Silent(), lambda _: None)
        total = len(keys)
        for number in range(cuts):
            folder = self.folder("snapshot")
            with counted_saves(stop=max(5, total * (number + 1) // (cuts + 1))), _cut():
                quantize.run_quantize(self.config(kind, folder), "hawqtool quantize", Silent(), lambda _: None)
            copy = self.place / "undamaged"
            shutil.copytree(folder, copy)
            again = self.go_on(kind, copy)
            shutil.rmtree(copy)
            if again.outcome != expected:
                raise SystemExit(f"{kind}, cut {number}: without damage it ends otherwise: {again.error or 'other'}")
            yield folder, again.saved

    def folder(self, name: str) -> Path:
        """An empty folder."""
        folder = self.place / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def go_on(self, kind: str, folder: Path) -> Trial:
        """Run to the end in a folder, whatever lies there."""
        trial = Trial()
        with counted_saves() as keys:
            try:
                config = self.config(kind, folder)
                quantize.run_quantize(config, "hawqtool quantize", Noting(trial.warnings), lambda _: None)
                trial.outcome = outcome(folder / "out")
            except HawqError as error:
                trial.error, trial.refused = str(error), True
            except Exception:  # whatever it is, it is what this script looks for
                trial.error = traceback.format_exc(limit=-3)
        trial.saved = set(keys)
        return trial


def judge(trial: Trial, expected: dict[str, Any], damaged: str, redone: set[str]) -> tuple[str, str]:
    """Verdict on a run that went on after a flip, and what is wrong with it."""
    if trial.refused:
        return REFUSED, trial.error
    if trial.outcome is None:
        return TRACEBACK, trial.error
    different = [name for name, value in expected.items() if trial.outcome.get(name) != value]
    if different:
        return SILENT, f"other {', '.join(different)}; warnings: {trial.warnings}"
    more = {key for key in trial.saved - redone if not _AGAIN.search(key) and not _is_part(key, damaged)}
    if more:
        return TOO_MUCH, f"done again: {', '.join(sorted(more))}"
    return (MENDED, "") if trial.warnings else (HARMLESS, "")


def _is_part(key: str, damaged: str) -> bool:
    """Whether a key is the damaged one or rests on it.

    A plan rests on its written files and on the records of them, which are removed where another plan is better; a
    rounded block on those before it in its plan, and what is distilled is one part.
    """
    name = Path(damaged).name.removesuffix(SUFFIX).removeprefix("copy.")
    whole = re.search(r"plans/(\w+)", damaged) or re.fullmatch(r"(\w+)\.(as-written|rounding|quality)", name)
    block = re.match(r"\w+\.(block|distill)\.", name)
    return key == name or key.startswith(whole[1] if whole else block[0] if block else "\0")


def flip_a_bit(folder: Path, generator: random.Random) -> tuple[str, int]:
    """Flip one bit of one file of a private folder: its relative path and the bit's number."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = generator.choice(files)
    content, bit = bytearray(path.read_bytes()), generator.randrange(8 * path.stat().st_size)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return path.relative_to(folder).as_posix(), bit


def outcome(folder: Path) -> dict[str, Any]:
    """What a run gives: hashes of its weights, plan, scores and all figures of its report, times left out."""
    found: dict[str, Any] = {file.name: file_hash(file) for file in sorted(folder.glob("*.safetensors"))}
    for name in ("reproduce/plan.json", "reproduce/sensitivity.json", "reproduce/checksums.json", "report.json"):
        if (folder / name).is_file():
            found[name] = _timeless(load_json(folder / name))
    return found


def _timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if not _TIMES.search(key)}
    return [_timeless(value) for value in tree] if isinstance(tree, list) else tree


@contextmanager
def counted_saves(stop: int | None = None) -> Iterator[list[str]]:
    """Keys that are saved, copies aside, while the context lasts; cuts the run when so many were."""
    save, keys = Checkpoints.save, list[str]()

    def counted(store: Checkpoints, key: str, content: Any) -> None:
        save(store, key, content)
        if store.prefix != "copy.":
            keys.append(store.prefix + key)
            if len(keys) == stop:
                raise _Cut

    Checkpoints.save = counted  # type: ignore[method-assign, assignment]
    try:
        yield keys
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]


@contextmanager
def _cut() -> Iterator[None]:
    """Take the end of a run that is cut."""
    try:
        yield
    except _Cut:
        return
    raise SystemExit("the run ended before it was cut")


if __name__ == "__main__":
    sys.exit(main())
