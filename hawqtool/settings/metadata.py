"""What a setting says of itself: help, place in the help page, what it affects, which commands take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

MODEL, OUTPUT, TARGET, FORMATS, CALIBRATION = "Model", "Output", "Target", "Formats", "Calibration"
METHOD, RUN = "Method", "Run"
GATES = "Gates (they judge the result; exit code 3 if it fails one, and the output is kept)"
EXPERT = "Expert (what the run decides well without them)"
"""Panel of the help page for settings that few need; ``configs/default.yaml`` has them under their own panel."""


class Affects(Enum):
    """What differs between two runs that differ in a setting; identity and fingerprints are made from it."""

    PLACE = auto()
    """Nothing in the result: where things lie, how to begin, how much memory to use."""
    GATES = auto()
    """What the report says of passing; no weight."""
    MODEL = auto()
    """The model; known by its content."""
    MACHINE = auto()
    """Where and in which portions sums are made; known as the machine and the resolved number."""
    ROWS = auto()
    """Rows that calibrate and judge; known by their content."""
    FORMATS = auto()
    """The menu of formats of each unit."""
    METRICS = auto()
    """Which scores are measured and used."""
    SCORES = auto()
    """The scores, and the weights too."""
    TARGET = auto()
    """Which plan is chosen from the scores: the budget. At most one of these is given."""
    PLAN = auto()
    """Which plan is chosen from the scores: all else."""
    WEIGHTS = auto()
    """The weights, after the plan is chosen."""


@dataclass(frozen=True)
class ByDevice:
    """A default that depends on the kind of device."""

    cuda: int
    cpu: int

    def on(self, device_type: str) -> int:
        """The default on ``cuda`` or ``cpu``."""
        return self.cuda if device_type == "cuda" else self.cpu


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Metadata of a field of the run configuration; options, pages, schema and fingerprints are made from it.

    Args:
        help: What the help page says; the default is added.
        panel: Group on the help page and in ``configs/default.yaml``.
        affects: What it changes.
        detail: Further sentences for ``configs/default.yaml`` and the JSON schema.
        default: The default in words, where the run decides it or its value says too little.
        by_device: The default in numbers, where it depends on the device.
        metavar: What stands for the value on the help page.
        flags: Spellings of the flag, where there are others than ``--name``.
        as_text: Whether the flag takes text that the configuration parses, such as ``2,3,4`` or ``5%``.
        names: What the value names where that has content of its own: a file, or a source of rows.
        commands: Commands that take it, beside ``quantize`` and ``config``, which take all.
        example: Value in ``configs/default.yaml`` where the default would be no run.
        in_batch: What takes its place in the file of a batch, where all jobs share it.
        expert: Whether ``--help`` leaves it to ``--help-all``.
    """

    help: str
    panel: str
    affects: Affects
    detail: str = ""
    default: str = ""
    by_device: ByDevice | None = None
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    as_text: bool = False
    names: Literal["file", "source"] | None = None
    commands: tuple[str, ...] = ()
    example: Any = None
    in_batch: str = ""
    expert: bool = False


def flag_of(name: str) -> str:
    """``--target-bpw`` for ``target_bpw``."""
    return f"--{name.replace('_', '-')}"


def setting_of(field: FieldInfo) -> Setting:
    """The metadata of a field.

    Raises:
        TypeError: If it has none; a setting that says nothing of itself is a mistake of ours.
    """
    found = [item for item in field.metadata if isinstance(item, Setting)]
    if len(found) != 1:
        raise TypeError(f"a setting needs one Setting in its annotation, found {len(found)}")
    return found[0]


def settings_of(model: type[BaseModel]) -> Mapping[str, Setting]:
    """Metadata by name, in the order of the fields."""
    return {name: setting_of(field) for name, field in model.model_fields.items()}


def help_of(field: FieldInfo, setting: Setting) -> str:
    """The help text with the default."""
    default = default_words(field, setting)
    return f"{setting.help.removesuffix('.')} [default: {default}]." if default else setting.help


def default_words(field: FieldInfo, setting: Setting) -> str:
    """The default in words; empty where there is none to speak of."""
    if setting.default:
        return setting.default
    if setting.by_device is not None and setting.by_device.cuda == setting.by_device.cpu:
        return str(setting.by_device.cpu)
    if setting.by_device is not None:
        return f"{setting.by_device.cuda}, on a CPU {setting.by_device.cpu}"
    if field.is_required() or field.default in (None, ()) or isinstance(field.default, bool):
        return ""
    return ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Words that a setting takes, as its type lists them; none where it takes anything else too."""
    found = [field.annotation]
    for kind in found:
        if get_origin(kind) in (Union, UnionType):
            found += get_args(kind)
    words = [word for kind in found if get_origin(kind) is Literal for word in get_args(kind)]
    return tuple(word for word in words if isinstance(word, str))


def flag_type(field: FieldInfo, setting: Setting) -> type[Any] | Any:
    """Type of the flag's value: that of the field if it is a number or a switch, a list where it repeats, else text."""
    if setting.as_text:
        return str
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is tuple:
        return list[str]
    return kind if kind in (int, float, bool) else str
