"""Launcher of a batch: a command prefix that starts each job somewhere else, such as srun or ssh."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hawqtool.errors import UsageError


@dataclass(frozen=True)
class Launcher:
    """A command prefix.

    Args:
        words: Program and its arguments.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Launcher:
        """The prefix of a text that is quoted as in a shell.

        Raises:
            UsageError: If it has no words, its quotes are not closed, or there is no such program.
        """
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(f"--launcher {text!r} cannot be read ({error}); quote it as for a shell") from None
        if not words:
            raise UsageError('--launcher is empty, expected a command such as "srun --gpus 1 --"')
        if shutil.which(words[0]) is None:
            raise UsageError(f"--launcher names {words[0]}, which is no program here; check its name and PATH")
        return cls(words)

    def command(self, command: Sequence[str]) -> tuple[str, ...]:
        """A command with the prefix; for ssh, which hands one text to a shell in another folder, made to fit that."""
        if Path(self.words[0]).name != "ssh":
            return (*self.words, *command)
        return (*self.words, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}")
