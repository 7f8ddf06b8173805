"""What transformers asks the disk for while it is imported, asked for with fewer questions.

It looks up by which installed distribution each module came, and reads the source of all its models, twice. Where each
question takes a fraction of a millisecond, as in sandboxes, that is seconds: of 152 s of an 8B model's run on an H200
those took 5, beside torch (commit `4208c2c`).
"""

from __future__ import annotations

import csv
import importlib.metadata
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

_THREADS = 8
_MODELS, _UTILS, _SCAN = "transformers.models", "transformers.utils.import_utils", "define_import_structure"
_PREFIX = "models"
"""What transformers puts in front of names of modules under its models."""


@contextmanager
def quick_distributions() -> Iterator[None]:
    """While the context lasts, the standard library's map of modules to distributions is made by `distributions_of`."""
    real = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = distributions_of
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = real


def distributions_of() -> Mapping[str, list[str]]:
    """Names of distributions by the modules that they brought, from their lists of files.

    From Python 3.12 on `importlib.metadata.packages_distributions` also looks whether each file of a list is there.
    """
    found: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(_THREADS) as threads:  # which wait for the disk side by side
        for name, modules in threads.map(_modules_of, importlib.metadata.distributions()):
            for module in modules:
                found[module].append(name)
    return dict(found)


def _modules_of(distribution: Distribution) -> tuple[str, list[str]]:
    """Name of a distribution, and the modules and packages that it brought; a broken one has no name."""
    modules = (distribution.read_text("top_level.txt") or "").split()
    if not modules:
        record = distribution.read_text("RECORD")
        paths = [str(path) for path in distribution.files or ()] if record is None else _paths(record)
        modules = [module for module in dict.fromkeys(map(_first_part, paths)) if "." not in module]
    return (distribution.metadata["Name"] if modules else "", modules)


def _paths(record: str) -> list[str]:
    return [line[0] for line in csv.reader(record.splitlines()) if line]


def _first_part(path: str) -> str:
    """The package that a file lies in, or the module that it is."""
    first, below, _ = path.partition("/")
    return first if below else inspect.getmodulename(first) or first


def import_models() -> None:
    """Import ``transformers.models`` with the description of its modules that ``import transformers`` has made.

    Where another version has that in another form, all files are read again.
    """
    utils: Any = import_module(_UTILS)
    real = getattr(utils, _SCAN, None)
    if real is None:
        import_module(_MODELS)
        return
    setattr(utils, _SCAN, _described_once(real))
    try:
        import_module(_MODELS)
    finally:
        setattr(utils, _SCAN, real)


Structure = dict[Any, dict[str, set[str]]]
"""By what they need, modules with the names that they export."""


def _described_once(real: Callable[..., Structure]) -> Callable[..., Structure]:
    """The function that describes a folder, which first looks whether it is known under `_PREFIX`."""

    def describe(module_path: str, prefix: str | None = None) -> Structure:
        folder = Path(module_path).parent
        known = getattr(real, "cache_info", None)
        if prefix is not None or folder.name != _PREFIX or known is None:
            return real(module_path, prefix=prefix)
        before = known().hits
        found = real(folder, prefix=_PREFIX)
        if known().hits == before:  # it was not known after all
            return real(module_path, prefix=prefix)
        start = f"{_PREFIX}."
        return {
            needed: {name.removeprefix(start): set(names) for name, names in modules.items() if name.startswith(start)}
            for needed, modules in found.items()
        }

    return describe
