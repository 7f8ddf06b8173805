"""Kill runs at random moments and fill their disks, run them again, and compare with an undisturbed run.

A tiny model is quantized (sampled rows, measurement, short list, one round of swaps, distillation, uniform plans).
Every run is a fork of this process, which has imported everything beforehand, so that moments fall into the work, not
into imports.
After every trial the hashes of the weights and the plan must be those of the undisturbed run, no output may ever be
half complete, and nothing else may be left beside it. Full disks are small tmpfs mounts, made as root or, where that
is not allowed, in a user namespace of the script's own.

    PYTHONPATH=. python scripts/soak/kill_tests.py [--kills 50] [--terms 20] [--disks 20]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hawqtool.cli.app import app
from hawqtool.pipeline import quantize
from hawqtool.rounding.learned import training as learning
from hawqtool.streaming import resume_points as resume_points
from tests.support.tiny import tiny_llama

OPTIONS = (
    *("--bits", "2,3,4,8", "--target-bpw", "5", "--group-size", "32", "--num-samples", "8", "--seq-len", "16"),
    *(
        "--eval-samples",
        "8",
        "--shortlist",
        "2",
        "--swaps",
        "1",
        "--distill-steps",
        "4",
        "--device",
        "cpu",
        "--quiet",
    ),
)
WITHOUT_RESUME = 5
"""Every trial of this number is run again with --restart."""

AGAIN = 0.5
"""Share of the resumed runs that are killed once more."""

_PAGE, _LARGE = 4096, 1 << 30
_IN_NAMESPACE = "HAWQTOOL_KILL_TESTS_NAMESPACE"
_LOADED = quantize.run_quantize  # imported here, so that no run has to


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: the signal that killed it), stdout and stderr, seconds."""

    code: int
    text: str
    seconds: float


@dataclass
class Row:
    """One line of the table."""

    name: str
    trials: int = 0
    early: int = 0
    resumed: int = 0
    anew: int = 0
    finished: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def line(self) -> str:
        """The row as it is printed."""
        again = statistics.median(self.seconds) if self.seconds else float("nan")
        return (
            f"{self.name:>10} {self.trials:7} {self.finished:9} {self.early:7} {self.resumed:8} {self.anew:6} "
            f"{len(self.failures):9} {again:12.2f}"
        )


HEAD = "      kind  trials  finished   early  resumed   anew  failures  seconds more"


class Wrong(Exception):
    """A trial did not end as it must."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns 1 when a trial fails, 2 where no small disk can be mounted.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    parser = argparse.ArgumentParser(description="Kill runs, fill disks, resume, compare.")
    parser.add_argument("--kills", type=int, default=50, help="runs that get SIGKILL")
    parser.add_argument("--terms", type=int, default=20, help="runs that get SIGTERM")
    parser.add_argument("--disks", type=int, default=20, help="sizes of a disk that fills")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the tiny model")
    parser.add_argument("--draw", action="store_true", help="draw the report too, which takes half of the time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args(arguments)
    if options.disks and not may_mount():
        if os.environ.get(_IN_NAMESPACE) or not shutil.which("unshare"):
            print("error: no tmpfs can be mounted here; run as root, or with --disks 0", file=sys.stderr)
            return 2
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        return subprocess.run(command, env=os.environ | {_IN_NAMESPACE: "1"}, check=False).returncode
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not options.draw:
        quantize.write_page = lambda *_: None
    resume_points.LEAST_SECONDS = 0.0  # so that the walks of a tiny model keep their states too
    learning.BYTES_PER_SECOND = math.inf
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), options.layers, random.Random(options.seed))
        print(
            f"an undisturbed run: {bench.whole:.2f} s, most on its disk {bench.peak / 1e3:.0f} kB\n{HEAD}", flush=True
        )
        rows = [
            bench.row("SIGKILL", options.kills, lambda n, row: bench.killed(n, row, signal.SIGKILL)),
            bench.row("SIGTERM", options.terms, lambda n, row: bench.killed(n, row, signal.SIGTERM)),
            bench.row("full disk", options.disks, lambda n, row: bench.full_disk(n, row, options.disks)),
        ]
    failures = [failure for row in rows for failure in row.failures]
    print("\n".join(failures) if failures else "every trial gave the hashes and the plan of the undisturbed run")
    return int(bool(failures))


class Bench:
    """A model, an undisturbed run on it, and trials.

    Args:
        place: Empty folder.
        layers: Blocks of the model.
        moments: Draws the moments.
    """

    def __init__(self, place: Path, layers: int, moments: random.Random) -> None:
        self.place, self.moments = place, moments
        self.model = place / "model"
        in_fork(lambda: tiny_llama(self.model, layers=layers), place / "log", None, signal.SIGKILL)
        reference = place / "reference"
        reference.mkdir()
        ended = self.run(reference / "out")
        if ended.code:
            raise SystemExit(f"the undisturbed run ended with {ended.code}: {ended.text}")
        self.expected = result(reference / "out")
        again = self.run(reference / "again")
        if result(reference / "again") != self.expected:
            raise SystemExit("two undisturbed runs differ; is the machine's arithmetic reproducible?")
        self.whole = min(ended.seconds, again.seconds)
        self.peak = 0
        if may_mount():
            with disk(place / "large", _LARGE) as folder, watched(folder) as used:
                self.run(folder / "out")
            self.peak = max(used)

    def run(self, output: Path, *options: str, after: float | None = None, number: int = signal.SIGKILL) -> Ended:
        """A run in a fork, with a signal after some seconds."""
        command = ["quantize", str(self.model), "-o", str(output), *OPTIONS, *options]
        return in_fork(lambda: app(command), self.place / "log", after, number)

    def row(self, name: str, count: int, trial: Callable[[int, Row], None]) -> Row:
        """Some trials, and their line printed."""
        row = Row(name)
        for number in range(count):
            row.trials += 1
            try:
                trial(number, row)
                row.finished += 1
            except Wrong as wrong:
                row.failures.append(f"{name} {number}: {wrong}")
        print(row.line(), flush=True)
        return row

    def killed(self, number: int, row: Row, kind: signal.Signals) -> None:
        """A run that gets a signal at a random moment, and is finished afterwards."""
        folder = self.place / f"{kind.name}-{number}"
        folder.mkdir()
        output = folder / "out"
        ended = self.run(output, after=self.moments.uniform(0, self.whole), number=kind)
        self.check_end(ended, output, kind)
        if number % WITHOUT_RESUME != WITHOUT_RESUME - 1 and self.moments.random() < AGAIN:
            ended = self.run(output, after=self.moments.uniform(0, self.whole), number=kind)
            self.check_end(ended, output, kind)
        self.finish(output, row, resume=number % WITHOUT_RESUME != WITHOUT_RESUME - 1)
        shutil.rmtree(folder)

    def check_end(self, ended: Ended, output: Path, kind: signal.Signals) -> None:
        """What must hold after the signal: no half output, and words that are true."""
        if output.exists() and result(output) != self.expected:
            raise Wrong("the output is half complete")
        if "Traceback" in ended.text:
            raise Wrong(f"a traceback: {ended.text}")
        kept = (output.parent / f".{output.name}.hawqtool").exists()
        if kind == signal.SIGTERM and ended.code == 128 + signal.SIGTERM:
            said = "finished work is kept" in ended.text
            if said != kept:
                raise Wrong(f"work is {'kept' if kept else 'gone'}, but it said: {ended.text}")
        elif ended.code not in (0, -kind, 2):
            raise Wrong(f"exit code {ended.code}: {ended.text}")

    def full_disk(self, number: int, row: Row, count: int) -> None:
        """A run whose disk is too small, and goes on when it has become larger."""
        size = max(_PAGE, (number + 1) * self.peak // (count + 1) // _PAGE * _PAGE)
        with disk(self.place / f"disk-{number}", size) as folder:
            output = folder / "out"
            ended = self.run(output)
            if ended.code not in (0, 5):
                raise Wrong(f"{size} bytes: exit code {ended.code}: {ended.text}")
            if ended.code == 5 and (len(ended.text.strip().splitlines()) != 1 or output.exists()):
                raise Wrong(f"{size} bytes: {ended.text}")
            subprocess.run(["mount", "-o", f"remount,size={_LARGE}", str(folder)], check=True)
            self.finish(output, row, resume=True)

    def finish(self, output: Path, row: Row, resume: bool) -> None:
        """Run to the end, unless it came there before, and compare."""
        folder = output.parent / f".{output.name}.hawqtool"
        early = output.exists() and not folder.exists()
        ended = self.run(output, *([] if resume else ["--restart"]))
        if output.exists() and ended.code == 2 and "is not empty" in ended.text:
            early = True
        elif ended.code:
            raise Wrong(f"the run after it ended with {ended.code}: {ended.text}")
        if result(output) != self.expected:
            raise Wrong("the result is another one")
        left = sorted(p.name for p in output.parent.iterdir() if p != output)
        parts = sorted(str(p) for p in output.rglob(".*"))
        if left or parts:
            raise Wrong(f"left behind: {', '.join(left + parts)}")
        row.early += early
        row.resumed += resume and not early
        row.anew += not resume and not early
        row.seconds.append(ended.seconds)


def in_fork(work: Callable[[], object], log: Path, after: float | None, number: int) -> Ended:
    """Call a function in a fork of this process, with its output in a file, and send a signal after some seconds."""
    start = time.perf_counter()
    process = os.fork()
    if process == 0:
        _child(work, log)
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        spent = time.perf_counter() - start
        if found:
            return Ended(os.waitstatus_to_exitcode(status), log.read_text(), spent)
        if after is not None and spent >= after:
            os.kill(process, number)
            after = None
        time.sleep(0.001)


def _child(work: Callable[[], object], log: Path) -> NoReturn:
    code: Any = 0
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        import torch
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # the command does so where it is the first to import transformers
        torch.set_num_threads(1)  # the parent's threads are not in the fork
        work()
    except SystemExit as leave:
        code = leave.code or 0
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr)
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def result(output: Path) -> dict[str, Any] | None:
    """Hashes of the weights as they lie there, and the plan; None for an output that is not complete."""
    import hashlib

    try:
        listed = json.loads((output / "reproduce/manifest.json").read_text())["files"]
        plan = json.loads((output / "reproduce/plan.json").read_text()) | {"seconds": None}
        json.loads((output / "report.json").read_text())
    except (OSError, ValueError):
        return None
    recorded = {name: entry["sha256"] for name, entry in listed.items() if name.endswith(".safetensors")}
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in output.glob("*.safetensors")}
    return {"files": files, "plan": plan} if files == recorded else None


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of a size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def may_mount() -> bool:
    """Whether a tmpfs can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", folder]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Bytes in use on a disk, a few hundred times a second."""
    used, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            status = os.statvfs(folder)
            used.append((status.f_blocks - status.f_bfree) * status.f_frsize)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield used
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
