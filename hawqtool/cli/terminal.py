"""Narration and progress on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hawqtool.parsing import terminal_line
from hawqtool.report.documents import Phase
from hawqtool.report.wording import duration

_PLAIN_SECONDS = 5.0
"""Seconds after which a plain line says how far the work is."""

_TRUST = 0.1


class Course:
    """Where a run is among its phases, and how much time it has left.

    What is to come is scaled by how long the phases so far took against what was estimated.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = list(phases)
        self.position = -1
        self._spent = self._estimated = 0.0

    def enter(self, stage: str, seconds: float) -> None:
        """A stage begins, after so many seconds of the one before; what no phase is called stays within the last."""
        later = range(self.position + 1, len(self.phases))
        found = next((i for i in later if stage.startswith(self.phases[i]["name"])), None)
        if self.position >= 0:
            self._spent += seconds
        if found is None:
            return
        if self.position >= 0:
            self._estimated += self.phases[self.position]["seconds"]
        self.position = found

    @property
    def label(self) -> str:
        """``phase 3 of 9``; empty before the first."""
        return f"phase {self.position + 1} of {len(self.phases)}" if self.position >= 0 else ""

    def left(self, seconds: float, share: float) -> float | None:
        """Seconds that the whole run has left, after so many seconds and such a share of this stage."""
        if self.position < 0:
            return None
        own = self.phases[self.position]["seconds"]
        spent, estimated = self._spent + seconds, self._estimated + own * share
        later = sum(phase["seconds"] for phase in self.phases[self.position + 1 :])
        # A short first phase tells little of the others: the estimate counts as a tenth of the run that was on time.
        trust = _TRUST * sum(phase["seconds"] for phase in self.phases)
        pace = (spent + trust) / (estimated + trust) if estimated + trust > 0 else 1.0
        return pace * (own * (1 - share) + later)


class Terminal:
    """A bar with time left on a terminal, plain lines elsewhere, nothing when quiet.

    Args:
        quiet: Say nothing but warnings.
        verbose: Say when a stage ends and how long it took.
    """

    def __init__(self, quiet: bool, verbose: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet, self.verbose = quiet, verbose
        self.answered = False
        """Whether the result is on stdout already; a failure after it, such as of a gate, adds no document."""
        self.warnings: list[str] = []
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._begin = self._printed = time.monotonic()
        self._stage, self._done, self._total = "", 0, 1
        self._course = Course(())
        self._pulse: _Pulse | None = None

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self._started

    def expect(self, phases: Sequence[Phase]) -> None:
        """The phases that are to come, for their number and the time left."""
        self._course = Course(phases)

    def say(self, text: str) -> None:
        """One line of narration."""
        if not self.quiet:
            self.console.print(terminal_line(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning line; kept to be repeated at the end."""
        self.warnings.append(text)
        self.console.print(f"warning: {terminal_line(text)}", markup=False, style="yellow", soft_wrap=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Advance the bar of a stage; on a terminal drawn in place, else a line now and then."""
        if self.quiet:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._begin_stage(stage, now)
        self._done, self._total = done, total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, left=self._left_text(now))
        elif done == total or now - self._printed >= _PLAIN_SECONDS:
            self._print_line(now)

    def _begin_stage(self, stage: str, now: float) -> None:
        self.close()
        self._course.enter(stage, now - self._begin)
        self._stage, self._begin, self._printed, self._done, self._total = stage, now, now, 0, 1
        if sys.stderr.isatty():
            columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self._title(), total=None, left="")
        else:
            self._pulse = _Pulse(self)

    def _title(self) -> str:
        return f"{self._course.label}, {self._stage}" if self._course.label else self._stage

    def _left_text(self, now: float) -> str:
        """What the whole run has left where its phases are known, else what the stage has."""
        spent, share = now - self._begin, self._done / max(1, self._total)
        left = self._course.left(spent, share)
        if left is not None:
            return f"{duration(left)} left in all"
        return f"about {duration(spent / share - spent)} left" if 0 < share < 1 else ""

    def _print_line(self, now: float) -> None:
        left = self._left_text(now)
        text = f"{self._title()}: {self._done}/{self._total}, {now - self._begin:.0f} s" + (f", {left}" if left else "")
        self.console.print(text, markup=False, soft_wrap=True)
        self._printed = now

    def beat(self) -> None:
        """Print how far the stage is where nothing was said for a while."""
        now = time.monotonic()
        if now - self._printed >= _PLAIN_SECONDS:
            self._print_line(now)

    def close(self) -> None:
        """Finish the current bar."""
        if self._pulse is not None:
            self._pulse.end()
            self._pulse = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        if self.verbose and self._stage and not self.quiet:
            self.console.print(f"{self._title()}: done in {time.monotonic() - self._begin:.1f} s", markup=False)
        if self._stage:
            self._course.enter("", time.monotonic() - self._begin)
            self._stage, self._begin = "", time.monotonic()


class _Pulse:
    """A thread that has a terminal say now and then that the work goes on."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._over = terminal, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_PLAIN_SECONDS):
            self._terminal.beat()

    def end(self) -> None:
        """No more lines; it is not waited for."""
        self._over.set()
