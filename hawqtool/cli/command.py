"""Help pages, and what cannot be parsed.

Flags that take no value show none, ``--help-all`` shows what ``--help`` leaves out, and a wrong option is told in one
line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from hawqtool.errors import UsageError
from hawqtool.parsing import terminal_line

_WrongOption: Any = typer.BadParameter.__base__
"""What typer raises for all that it cannot parse; it exports this one kind of it."""


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """A wrong option or command ends the program as other wrong settings do, by one line instead of a box."""
    try:
        yield
    except _WrongOption as error:
        told = error.format_message()
        if "\n" in told:  # the help page of the program without a command
            raise
        words = terminal_line(f"{told[:1].lower()}{told[1:]}".rstrip("."))
        print(f"error: {words}; --help lists what there is", file=sys.stderr)
        raise SystemExit(UsageError.exit_code) from error


class _Plain:
    """Mixin of a command: what it cannot parse is one line, and switches have nothing where a value is described."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        """Parse the arguments."""
        with _told_in_one_line():
            return super().make_context(*given, **named)  # type: ignore[misc]

    def get_params(self, context: Any) -> list[Any]:
        """Parameters of the command, help included."""
        found: list[Any] = super().get_params(context)  # type: ignore[misc]
        for parameter in found:
            if isinstance(parameter, TyperOption) and parameter.is_flag and parameter.metavar is None:
                parameter.metavar = ""
        return found


class Command(_Plain, TyperCommand):
    """A command."""


class Group(_Plain, TyperGroup):
    """The program with its commands."""

    def resolve_command(self, *given: Any, **named: Any) -> Any:
        """Find the command that is named."""
        with _told_in_one_line():
            return super().resolve_command(*given, **named)


def show_all(context: typer.Context, wanted: bool) -> None:
    """Callback of ``--help-all``: print the help page with nothing left out, and end."""
    if not wanted:
        return
    for parameter in context.command.params:
        if isinstance(parameter, TyperOption):
            parameter.hidden = False
    text = context.get_help()  # with rich it is printed, and this is empty
    if text:
        print(text)
    raise typer.Exit
