"""What the stages tell the person who waits."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives narration and progress; the command line renders it on stderr."""

    def say(self, text: str) -> None:
        """One line of narration."""

    def warn(self, text: str) -> None:
        """A warning, repeated at the end."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of a stage are complete."""


class Silent:
    """A reporter for library use and tests; keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """Ignore narration."""

    def warn(self, text: str) -> None:
        """Keep the warning."""
        self.warnings.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Ignore progress."""
