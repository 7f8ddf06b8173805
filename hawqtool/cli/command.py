"""Help pages: flags that take no value show none, and ``--help-all`` shows what ``--help`` leaves out."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption


class _PlainFlags:
    """Mixin of a command whose switches have nothing where the value of others is described."""

    def get_params(self, context: Any) -> list[Any]:
        """Parameters of the command, help included."""
        found: list[Any] = super().get_params(context)  # type: ignore[misc]
        for parameter in found:
            if isinstance(parameter, TyperOption) and parameter.is_flag and parameter.metavar is None:
                parameter.metavar = ""
        return found


class Command(_PlainFlags, TyperCommand):
    """A command."""


class Group(_PlainFlags, TyperGroup):
    """The program with its commands."""


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
