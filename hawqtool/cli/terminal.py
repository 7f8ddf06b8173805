"""Narration and progress on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from hawqtool.parsing import terminal_line
from hawqtool.report.documents import Phase
from hawqtool.report.wording import duration

_PLAIN_SECONDS = 4.0
"""Seconds after which a plain line says how far the work is: with a beat each fifth, silence stays below five."""
_WIDE = 100
"""Columns from which a bar has room for the time of its stage."""

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


class StageColumn(ProgressColumn):
    """What a bar stands for; on a narrow terminal its end gives way, and nothing else."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        """One line of text."""
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class Terminal:
    """A bar with time left on a terminal, plain lines elsewhere, nothing when quiet.

    While it is watched, which a session sees to, it is never silent for long: where nothing else is said, such as while
    the result is drawn, a line says that the work goes on. Before anything was said only a person at a terminal is
    told: elsewhere a failure stays one line.

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
        self._course, self._spoke = Course(()), False
        self._pulse: _Pulse | None = None

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self._started

    def expect(self, phases: Sequence[Phase]) -> None:
        """The phases that are to come, for their number and the time left."""
        self._course = Course(phases)

    def watch(self) -> None:
        """Say now and then that the work goes on, until `end`."""
        if not self.quiet:
            self._pulse = _Pulse(self)

    def end(self) -> None:
        """Finish the current bar; nothing more is said by itself."""
        self.close()
        if self._pulse is not None:
            self._pulse.end()
            self._pulse = None

    def say(self, text: str) -> None:
        """One line of narration."""
        self._heard()
        if not self.quiet:
            self.console.print(terminal_line(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning line; kept to be repeated at the end."""
        self.warnings.append(text)
        self._heard()
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
        self._stage, self._begin, self._done, self._total = stage, now, 0, 1
        self._spoke = True
        if sys.stderr.isatty():
            self._bar = Progress(*_columns(self.console.width), console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self._title(), total=None, left="")

    def _heard(self) -> None:
        self._printed, self._spoke = time.monotonic(), True

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
        """Print how far the work is where nothing was said for a while; a bar shows that by itself."""
        now = time.monotonic()
        if self._bar is not None or now - self._printed < _PLAIN_SECONDS:
            return
        if self._stage and (self._done < self._total or self._course.label):  # what follows a phase belongs to it
            self._print_line(now)
        elif self._spoke or sys.stderr.isatty():
            what = "at work" if self._spoke else "starting"
            self.console.print(f"{what}, {now - self._started:.0f} s", markup=False, soft_wrap=True)
            self._printed = now

    def close(self) -> None:
        """Finish the current bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
            self._printed = time.monotonic()
        if self.verbose and self._stage and not self.quiet:
            self.console.print(f"{self._title()}: done in {time.monotonic() - self._begin:.1f} s", markup=False)
        if self._stage:
            self._course.enter("", time.monotonic() - self._begin)
            self._stage, self._begin = "", time.monotonic()


def _columns(width: int) -> list[ProgressColumn]:
    """Columns of a bar: stage, bar, steps, seconds where there is room, and what is left."""
    left = TextColumn("{task.fields[left]}")
    if width < _WIDE:
        return [StageColumn(), BarColumn(8), MofNCompleteColumn(), left]
    return [StageColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), left]


class _Pulse:
    """A thread that has a terminal say now and then that the work goes on."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._over = terminal, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_PLAIN_SECONDS / 5):
            self._terminal.beat()

    def end(self) -> None:
        """No more lines; it is not waited for."""
        self._over.set()
