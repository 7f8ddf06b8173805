"""Narration and progress on stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hawqtool.parsing import terminal_line

_PLAIN_SECONDS = 10.0


class Terminal:
    """A bar with time left on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.answered = False
        """Whether the result is on stdout already; a failure after it, such as of a gate, adds no document."""
        self.warnings: list[str] = []
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._begin, self._printed = "", 0.0, 0.0

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
            self.close()
            self._stage, self._begin, self._printed = stage, now, now
            if sys.stderr.isatty():
                self._bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=self.console,
                )
                self._bar.start()
                self._task = self._bar.add_task(stage, total=total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done == total or now - self._printed >= _PLAIN_SECONDS:
            spent = now - self._begin
            left = f", about {spent / done * (total - done):.0f} s left" if done < total else ""
            self.console.print(f"{stage}: {done}/{total}, {spent:.0f} s{left}", markup=False)
            self._printed = now

    def close(self) -> None:
        """Finish the current bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
