"""The YAML file of a batch: defaults, a matrix of settings and single jobs become named configurations."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hawqtool.config import SETTINGS, RunConfig, describe_problem, load_config, names_affecting
from hawqtool.errors import UsageError
from hawqtool.parsing import read_yaml, shown
from hawqtool.settings.metadata import Affects

JOBS, MEASUREMENTS, SUMMARY_JSON, SUMMARY_CSV = "jobs", "measurements", "summary.json", "summary.csv"
"""What lies in the folder of a batch beside the folders of its results."""

_KEYS = ("output", "measurements", "defaults", "matrix", "jobs")
_BATCH_WIDE = {name: setting.in_batch for name, setting in SETTINGS.items() if setting.in_batch}
"""Settings that jobs do not have, and what takes their place."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME, _LONGEST_PROBLEM, _MOST_PROBLEMS = 120, 300, 12
MOST_JOBS = 2000
"""Jobs of a batch: lists of a matrix multiply, and a wrong one would fill the memory."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class BatchJob:
    """One run of a batch: its name, which is that of its folder, and its configuration with output."""

    name: str
    config: RunConfig

    def yaml(self) -> str:
        """A file for ``hawqtool quantize -c`` that gives this configuration."""
        values = self.config.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Batch:
    """All jobs, in the order of the file, and the folder of the batch."""

    folder: Path
    jobs: tuple[BatchJob, ...]


def read_batch(path: Path, output: str | None, measurements: str | None, overwrite: bool) -> Batch:
    """The jobs of a file.

    Args:
        path: Has ``output``, ``measurements``, ``defaults``, ``matrix`` and ``jobs``.
        output: Wins over the file's.
        measurements: Wins over the file's.
        overwrite: Whether jobs may replace results of other settings.

    Raises:
        UsageError: Naming every problem of the file at once.
    """
    document = read_yaml(path)
    problems = [_unknown(key) for key in document if key not in _KEYS]
    defaults = _settings(document.get("defaults"), "defaults", problems)
    listed = _listed(document.get("jobs"), problems)
    found = [*listed, *_products(document.get("matrix"), defaults, problems)]
    folder = output or document.get("output")
    if not isinstance(folder, str) or not folder:
        problems.append(f"output: found {shown(folder)}, expected the folder of the batch (or give --output)")
        folder = "."
    if not found and not problems:
        problems.append("no job was found, expected a list under jobs or lists of settings under matrix")
    shared = measurements or document.get("measurements")
    if shared is not None and (not isinstance(shared, str) or not shared):
        problems.append(f"measurements: found {shown(shared)}, expected a folder")
        shared = None
    place = Path(folder)
    fixed = {"overwrite": overwrite, "measurements": str(shared or place / MEASUREMENTS)}
    jobs = _checked(found, defaults, place, fixed, problems)
    if problems:
        more = [f"and {len(problems) - _MOST_PROBLEMS} more problems"] if len(problems) > _MOST_PROBLEMS else []
        raise UsageError(f"{path}: " + "; ".join([*map(_short, problems[:_MOST_PROBLEMS]), *more]))
    return Batch(place, jobs)


def _short(problem: str) -> str:
    return problem if len(problem) <= _LONGEST_PROBLEM else f"{problem[:_LONGEST_PROBLEM]}..."


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _KEYS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_KEYS)}"
    if key in RunConfig.model_fields:
        hint = "put it under defaults, matrix or a job"
    return f"unknown key {key!r}, {hint}"


def _settings(value: Any, where: str, problems: list[str]) -> Settings:
    """A mapping of settings; those of the whole batch are refused."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f"{where}: found {shown(value)}, expected keys such as model and target_bpw")
        return {}
    found = {str(key).replace("-", "_"): content for key, content in value.items()}
    for key in found.keys() & _BATCH_WIDE.keys():
        problems.append(f"{where}: {key} is a setting of the whole batch; use {_BATCH_WIDE[key]}")
        del found[key]
    return found


def _listed(value: Any, problems: list[str]) -> list[tuple[str | None, Settings]]:
    """Names, where given, and settings of the single jobs."""
    if value is None:
        return []
    if not isinstance(value, list):
        problems.append(f"jobs: found {type(value).__name__}, expected a list")
        return []
    found = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            problems.append(f"job {number}: found {shown(entry)}, expected keys such as model and target_bpw")
            continue
        settings = _settings(entry, f"job {number}", problems)
        name = settings.pop("name", None)
        if name is not None and not _valid_name(name):
            problems.append(f"job {number}: name {shown(name)} is no folder name of letters, digits, dots and dashes")
            name = None
        found.append((name, settings))
    return found


def _valid_name(name: object) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and len(name) <= _LONGEST_NAME


def _products(value: Any, defaults: Settings, problems: list[str]) -> list[tuple[str | None, Settings]]:
    """Every combination of the lists of a matrix, with names that say what was combined."""
    if value is None:
        return []
    if not isinstance(value, dict) or not value:
        problems.append(f"matrix: found {shown(value)}, expected settings, each with a list of values")
        return []
    axes = []
    for key, items in value.items():
        axis = str(key).replace("-", "_")
        if axis in _BATCH_WIDE:
            problems.append(f"matrix: {axis} is a setting of the whole batch; use {_BATCH_WIDE[axis]}")
        elif not isinstance(items, list) or not items or len({isinstance(item, dict) for item in items}) > 1:
            problems.append(
                f"matrix: {axis} has {shown(items)}, expected a list, of values of this setting or of sets of settings"
            )
        else:
            axes.append([_choice(axis, item, problems) for item in items])
    count = math.prod(map(len, axes))
    if count > MOST_JOBS:
        problems.append(f"matrix: its lists make {count} jobs, expected at most {MOST_JOBS}; split the batch")
        return []
    # Names begin with the model, also where all jobs have the same one.
    alone = "model" in defaults and not any("model" in settings for axis in axes for _, settings in axis)
    first = [_label("model", defaults["model"])] if alone else []
    found: list[tuple[str | None, Settings]] = []
    for combination in itertools.product(*axes):
        settings = {key: value for _, chosen in combination for key, value in chosen.items()}
        found.append(("-".join([*first, *(label for label, _ in combination)]), settings))
    return found


def _choice(axis: str, item: Any, problems: list[str]) -> tuple[str, Settings]:
    """One value of a matrix: what it adds to the name, and its settings."""
    if not isinstance(item, dict):
        return _label(axis, item), {axis: item}
    settings = _settings(item, f"matrix: {axis}", problems)
    name = settings.pop("name", None)
    if name is not None and not _valid_name(name):
        problems.append(f"matrix: {axis}: name {shown(name)} is no folder name of letters, digits, dots and dashes")
    labels = [_label(key, value) for key, value in settings.items()]
    return str(name) if name is not None else "-".join(labels), settings


def _label(key: str, value: Any) -> str:
    """What a setting is called in a name, such as ``3.5bpw`` or ``group_size-64``."""
    if isinstance(value, (list, tuple)):
        text = "-".join(map(str, value))
    else:
        text = str(value).partition("@")[0].rstrip("/").rsplit("/", 1)[-1]
    if key == "target_bpw":
        text += "bpw"
    elif key == "target_kl":
        text = f"kl{text}"
    elif key not in ("model", "target_size", "rounding", "profile", "calibration"):
        text = f"{key}-{text}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or key


def _checked(
    found: list[tuple[str | None, Settings]], defaults: Settings, folder: Path, fixed: Settings, problems: list[str]
) -> tuple[BatchJob, ...]:
    """The jobs; adds what is wrong with them, equal problems of several once."""
    jobs, wrong = [], dict[str, list[str]]()
    for given, settings in found:
        merged = defaults | settings
        own = [_label(key, value) for key, value in settings.items() if key != "model"]
        name = (given or "-".join([_label("model", merged.get("model", "model")), *own]))[:_LONGEST_NAME]
        try:
            # A null takes a default away.
            config = load_config(None, merged)
            config.require_one_target()
        except UsageError as error:
            cause = error.__cause__
            found_here = [describe_problem(e, "") for e in cause.errors()] if isinstance(cause, ValidationError) else []
            for message in found_here or [str(error)]:
                wrong.setdefault(message, []).append(name)
            continue
        update = {"output": str(folder / name), **fixed}
        if not config.measures:
            update["measurements"] = None
        jobs.append(BatchJob(name, config.model_copy(update=update)))
    problems += [f"{_some(names)}: {message}" for message, names in wrong.items()]
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            problems.append(f"{count} jobs would write to {folder / name}; give them a name each")
        if name in (JOBS, MEASUREMENTS, SUMMARY_JSON, SUMMARY_CSV) or name.endswith(".png"):
            problems.append(f"a job is called {name}, which the batch itself uses; give it another name")
    return tuple(jobs)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more jobs"


def measured_settings(config: RunConfig) -> Mapping[str, Any]:
    """The settings that a measurement may depend on: jobs that are equal in these share one."""
    without = (Affects.PLACE, Affects.GATES, Affects.TARGET, Affects.PLAN, Affects.WEIGHTS)
    return config.model_dump(exclude={*names_affecting(*without)}) | {"measures": config.measures}
