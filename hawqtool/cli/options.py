"""Options of the command line: those of settings are made from `hawqtool.settings`, the others stand here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hawqtool.cli.command import show_all
from hawqtool.config import SETTINGS, RunConfig
from hawqtool.presets import preset_names
from hawqtool.settings.metadata import EXPERT, RUN, choices, flag_of, flag_type, help_of

Values = dict[str, Any]
"""Settings by name as the command line gave them; None where it did not."""

_TAKE_ALL = ("quantize", "config")
_HELP_ALL = "help_all"


def escaped(text: str) -> str:
    """Text for a help page, which takes square brackets for markup and would swallow ``[default: 128]``."""
    return text.replace("[", "\\[")


def _option(
    *names: str, help: str, panel: str, metavar: str | None = None, completion: Callable[[str], list[str]] | None = None
) -> object:
    return typer.Option(
        *names,
        help=escaped(help),
        rich_help_panel=panel,
        metavar=metavar,
        show_default=False,
        autocompletion=completion,
    )


def setting_names(command: str) -> tuple[str, ...]:
    """Settings that a command takes, in the order of its help page."""
    return tuple(name for name, s in SETTINGS.items() if command in _TAKE_ALL or command in s.commands)


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of its settings; it gets them as one parameter, ``values``."""
    names = setting_names(function.__name__)
    signature = inspect.signature(function, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        mine = parameter.name == "values"
        parameters += [setting_parameter(name) for name in names] if mine else [parameter]

    @wraps(function)
    def command(**given: Any) -> None:
        given.pop(_HELP_ALL, None)
        function(values={name: given.pop(name) for name in names}, **given)

    if any(SETTINGS[name].expert for name in names):
        parameters.append(_help_all())
    # Keywords alone need no order: options may stand before arguments.
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
    return command


def setting_parameter(name: str) -> inspect.Parameter:
    """A parameter whose default is None: a default of its own would win over the configuration file."""
    field, setting = RunConfig.model_fields[name], SETTINGS[name]
    text, kind = escaped(help_of(field, setting)), flag_type(field, setting)
    if field.is_required():
        option = typer.Argument(None, help=text, show_default=False)
    else:
        words = choices(field)
        option = typer.Option(
            None,
            *(setting.flags or (flag_of(name),)),
            help=text,
            rich_help_panel=EXPERT if setting.expert else setting.panel,
            metavar=setting.metavar,
            show_default=False,
            hidden=setting.expert,
            autocompletion=_completion(lambda: words) if words else None,
        )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)


def _completion(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell asks: the words that a beginning may be completed to."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return complete


def _help_all() -> inspect.Parameter:
    option = typer.Option(
        False,
        flag_of(_HELP_ALL),
        help="Show all options, those for experts too.",
        is_eager=True,
        callback=show_all,
        show_default=False,
    )
    return inspect.Parameter(_HELP_ALL, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool)


def narrowed(name: str, help: str) -> object:
    """The option of a setting whose meaning in a command is narrower than in the configuration."""
    setting = SETTINGS[name]
    return _option(flag_of(name), help=help, panel=setting.panel, metavar=setting.metavar)


Config = Annotated[
    Optional[Path],
    _option(
        "--config",
        "-c",
        help="YAML file, or the name of a preset; wins over --preset, and flags win over it.",
        panel=RUN,
        metavar="FILE",
    ),
]
Preset = Annotated[
    Optional[str],
    _option(
        "--preset",
        help="Settings to begin with: a name that hawqtool presets lists; files and flags win over it, and a target "
        "given there takes the place of its target.",
        panel=RUN,
        metavar="NAME",
        completion=_completion(preset_names),
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show what would be done, from headers alone; write nothing.",
        rich_help_panel=RUN,
    ),
]
Junit = Annotated[
    Optional[Path],
    typer.Option(
        "--junit",
        help="Write a JUnit report: a test case for the run and one per gate; also when the run fails.",
        rich_help_panel=RUN,
        metavar="FILE",
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on stdout, also for a failure.", rich_help_panel=RUN),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No narration and no progress.", rich_help_panel=RUN),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say when each phase ends, and how long it took.", rich_help_panel=RUN),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks of expected errors.", rich_help_panel=RUN),
]
