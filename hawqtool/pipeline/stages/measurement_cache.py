"""A folder of measurements that runs share, each under the fingerprint of all that it depends on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import cast

import torch

from hawqtool import __version__
from hawqtool.config import RunConfig, names_affecting
from hawqtool.errors import InputError, UsageError
from hawqtool.export.manifest import content_hash
from hawqtool.pipeline.run.files import SENSITIVITY_SCHEMA, file_hash, parse_sensitivity, read_json
from hawqtool.pipeline.run.identity import model_fingerprint
from hawqtool.pipeline.run.job import Job
from hawqtool.records import SWEEP_METRICS, Menu, Rows
from hawqtool.report.documents import SensitivityDocument
from hawqtool.rounding.kernels.dispatch import kernel_version
from hawqtool.runtime.reporter import Reporter
from hawqtool.settings.metadata import Affects

Document = SensitivityDocument

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def measurement_fingerprint(
    job: Job,
    formats: Menu,
    sets: Mapping[str, Rows],
    reporter: Reporter,
    metrics: Sequence[str] = SWEEP_METRICS,
) -> str:
    """SHA-256 of all that a measurement depends on: weights (every byte), rows, formats, settings, machine, versions.

    Args:
        job: The model and the settings.
        formats: Unit name to the formats to score.
        sets: Rows by role; calibration and scoring rows count.
        reporter: Progress, since reading all weights takes a while.
        metrics: Those of the common sweeps.
    """
    cuda = job.device.type == "cuda"
    parts = {
        "schema": SENSITIVITY_SCHEMA,
        "versions": {"hawqtool": __version__} | {name: metadata.version(name) for name in _PACKAGES},
        "model": model_fingerprint(job.index, reporter),
        "code": _code(job),
        # Sums are split by the number of threads.
        "machine": torch.cuda.get_device_name(job.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "kernel": kernel_version(job.device),
        "dtype": str(job.dtype),
        "batch_size": job.settings.batch_size,
        "rows": {role: sets[role].fingerprint for role in ("calibration", "scoring")},
        "units": [
            [unit.name, [member.name for member in unit.members], [fmt.label for fmt in formats[unit.name]]]
            for unit in job.units
        ],
        "method": asdict(job.settings.method),
        "metrics": [*metrics, *job.config.measured_extras],
        # Rows, formats and metrics stand above by their content; targets and gates change no score.
        "settings": job.config.model_dump(mode="json", include={*names_affecting(Affects.SCORES)}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code(job: Job) -> dict[str, str]:
    """SHA-256 by name of the code that the checkpoint brings along, where that runs."""
    files = sorted(job.index.folder.glob("*.py")) if job.source.runs_code else []
    try:
        return {file.name: file_hash(file) for file in files}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); check the disk") from error


def check_measurements(config: RunConfig) -> None:
    """Check before the work that the folder of measurements is one or can be made.

    Raises:
        UsageError: If it is a file, or its parent is missing.
    """
    if config.measurements is None:
        return
    folder = Path(config.measurements)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--measurements {folder} is a file, a folder was expected; choose another name")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"the parent folder of --measurements {folder} does not exist; create it first")


class MeasurementFolder:
    """Files of the form of sensitivity.json, named by fingerprint; several processes may use them at a time.

    A file appears complete, by rename, or not at all. Who needs what another process measures waits for it.

    Args:
        path: The folder; it is made when it is first needed.
        reporter: Told of waiting, of damaged files and of what could not be kept.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self.path, self.reporter = path, reporter

    def take(self, key: str, measure: Callable[[], Document]) -> tuple[Document, bool]:
        """The measurement of a fingerprint, and whether it was there already; otherwise it is made and kept."""
        with self._lock(key):
            found = self._read(key)
            if found is not None:
                return found, True
            made = measure()
            made["fingerprint"] = key
            self._keep(key, made)
            return made, False

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _read(self, key: str) -> Document | None:
        file = self._file(key)
        if not file.exists():
            return None
        try:
            document = cast(SensitivityDocument, read_json(file, SENSITIVITY_SCHEMA))
            parse_sensitivity(document, str(file))
            if document.get("fingerprint") != key:
                raise InputError(f"{file} holds the measurement of another fingerprint")
            if document.pop("checksum", None) != content_hash(document):
                raise InputError(f"{file} differs from its checksum")
        except (InputError, OSError) as error:
            self.reporter.warn(f"a shared measurement cannot be used and is made anew: {error}")
            return None
        return document

    def _keep(self, key: str, document: Document) -> None:
        part = self.path / f".{key}.{os.getpid()}.part"
        try:
            # Whoever holds the lock may remove what a killed process left.
            for left in self.path.glob(f".{key}.*.part"):
                left.unlink(missing_ok=True)
            text = json.dumps({**document, "checksum": content_hash(document)}, indent=1)
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(self._file(key))
        except OSError as error:
            # Hours of measuring must not be lost to a full or read-only cache.
            self.reporter.warn(f"the measurement could not be kept in {self.path} for other runs: {error.strerror}")
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Keep other processes from measuring the same; the system frees the lock when the process dies.

        Where the folder is read-only or its file system has no locks, two may measure the same: then the later rename
        wins, of equal content.
        """
        file = self.path / f".{key}.lock"
        handle = None
        try:
            self.path.mkdir(exist_ok=True)
            handle = self._locked(file)
        except OSError as error:
            self.reporter.say(f"{self.path} cannot be locked ({error.strerror}); going on without")
        try:
            yield
        finally:
            if handle is not None:
                file.unlink(missing_ok=True)
                os.close(handle)

    def _locked(self, file: Path) -> int:
        while True:
            handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
            with ExitStack() as unless_it_is_held:
                unless_it_is_held.callback(os.close, handle)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.reporter.say("waiting for another run, which measures the same")
                    fcntl.flock(handle, fcntl.LOCK_EX)
                # Whoever held the lock removed the file: this handle may be of one that has no name any more.
                if file.exists() and file.stat().st_ino == os.fstat(handle).st_ino:
                    unless_it_is_held.pop_all()
                    return handle
