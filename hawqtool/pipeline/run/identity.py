"""What makes two runs the same run, and whether the model's files are still those that the run began with."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hawqtool import __version__
from hawqtool.checkpoint.content import ContentRecord, Place
from hawqtool.checkpoint.index import CheckpointIndex, fingerprint, stored_places, weights_hash
from hawqtool.checkpoint.originals.codec import stored_parts
from hawqtool.checkpoint.rotated.codec import original_index
from hawqtool.config import SETTINGS, names_affecting
from hawqtool.data.sources import public_name
from hawqtool.errors import InputLostError
from hawqtool.pipeline.run.files import file_hash
from hawqtool.pipeline.run.fingerprint import small_file_hashes
from hawqtool.pipeline.run.job import Job
from hawqtool.rounding.kernels.dispatch import kernel_version
from hawqtool.runtime.background import beside
from hawqtool.runtime.launched import world_size
from hawqtool.runtime.reporter import Reporter
from hawqtool.settings.metadata import Affects

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy")
_WITHOUT_EFFECT = (Affects.PLACE, Affects.GATES)
_IN_ANOTHER_FORM = (Affects.MODEL, Affects.MACHINE)
_PHASE, _TELLS_EVERY = "fingerprint of the weights", 0.1
"""Name of the reading of all weights in the progress, and seconds between two reports of what is read beside."""

Stamps = dict[str, tuple[int, int]]
"""File name to size in bytes and time of the last change in nanoseconds."""


def run_identity(job: Job) -> dict[str, Any]:
    """Settings, model, machine kind and versions on which every hash of the result depends, by name.

    On a CPU the number of threads is one of them, because sums are split by it.
    """
    config = job.config
    values = config.model_dump(mode="json", exclude={*names_affecting(*_WITHOUT_EFFECT, *_IN_ANOTHER_FORM)})
    for name in (name for name in values if SETTINGS[name].names == "file"):
        if values[name] and Path(values[name]).is_file():
            values[name] = file_hash(Path(values[name]))
    # Where texts lie does not matter: the rows that they give have fingerprints of their own.
    values["calibration"] = {public_name(name): weight for name, weight in config.calibration_weights.items()}
    values["selection_data"] = [*map(public_name, config.selection_data)]
    values["eval_data"] = public_name(config.eval_data) if config.eval_data else None
    found = job.settings
    values |= {"selection_samples": found.selection_samples, "sampled_share": found.sampled_share}
    values |= {"num_samples": found.num_samples, "seq_len": found.seq_len, "batch_size": found.batch_size}
    cuda = job.device.type == "cuda"
    machine = torch.cuda.get_device_name(job.device) if cuda else f"cpu with {torch.get_num_threads()} threads"
    versions = {name: metadata.version(name) for name in _PACKAGES}
    content = job.index.content
    assert content is not None  # `prepare` makes one
    return values | {
        "model": fingerprint(job.index),
        "weights": content.weights,
        "device": machine,
        "ranks": world_size(),
        "kernel": kernel_version(job.device),
        "hawqtool": __version__,
        **versions,
        **content.files,
    }


@contextmanager
def content_beside(job: Job, before: Stamps) -> Iterator[Callable[[Reporter], None]]:
    """While the context lasts, a GPU's host hashes the bytes of the model beside other work.

    Args:
        job: The model.
        before: The stamps of its files when their headers were read.

    Yields:
        What waits until all of it is hashed, and tells how far that is; on a CPU it does nothing.

    Raises:
        InputLostError: If a file is another since then.
    """
    content, stop, over = job.index.content, threading.Event(), threading.Event()
    if job.device.type != "cuda" or content is None:
        yield lambda _: None
        return
    check_unchanged(job.index, before)
    places = _places(job.index)
    done = [0, len(places)]

    def read() -> None:
        try:
            content.read(places, lambda *now: done.__setitem__(slice(None), now), stop)
        finally:
            over.set()

    def wait(reporter: Reporter) -> None:
        while not over.wait(_TELLS_EVERY):
            reporter.progress(_PHASE, *done)
        finished()
        reporter.progress(_PHASE, len(places), len(places))

    finished = beside(read)
    try:
        yield wait
    finally:
        stop.set()


def _places(index: CheckpointIndex) -> list[Place]:
    """All places of the weights, by file and offset.

    So a part follows the tensor that it belongs to, whose bytes are in memory then.
    """
    parts = {part.place for info in original_index(index).tensors.values() for part in stored_parts(info)}
    return sorted(parts.union(stored_places(index.files)))


def record_content(
    index: CheckpointIndex, before: Stamps, reporter: Reporter, begun: Callable[[Reporter], None] = lambda _: None
) -> None:
    """Hash every byte of the model as the run begins; whatever it reads later is compared with that.

    Args:
        index: Its record is filled.
        before: The stamps of its files when their headers were read.
        reporter: Progress, since reading all weights takes a while.
        begun: Waits for what was begun beside (see `content_beside`).

    Raises:
        InputLostError: If a file cannot be read, or is another since its header was read.
    """
    content = index.content
    assert content is not None  # `prepare` makes one
    check_unchanged(index, before)
    begun(reporter)
    content.read(_places(index), partial(reporter.progress, _PHASE))
    check_unchanged(index, before)
    content.weights = weights_hash(index.files, content)
    try:
        content.files = small_file_hashes(index.folder)
    except OSError as error:
        raise InputLostError(
            f"{error.filename} cannot be read ({error.strerror}); the model must stay while the run lasts"
        ) from None


def model_fingerprint(index: CheckpointIndex, reporter: Reporter) -> str:
    """SHA-256 of config, headers and every byte of the weights, which are read where they were not hashed before."""
    if index.content is None or index.content.weights is None:
        record_content(index, stamps(index), reporter)
    assert index.content is not None and index.content.weights is not None  # just made
    return hashlib.sha256(f"{fingerprint(index)} {index.content.weights}".encode()).hexdigest()


def stamps(index: CheckpointIndex) -> Stamps:
    """Sizes and times of the files that the run reads from all the time.

    Raises:
        InputLostError: If one is gone.
    """
    found = {}
    for file in (index.folder / "config.json", *index.files):
        try:
            status = file.stat()
        except OSError as error:
            raise InputLostError(
                f"{file} is gone ({error.strerror}); the model must stay while the run lasts"
            ) from None
        found[file.name] = (status.st_size, status.st_mtime_ns)
    return found


def check_unchanged(index: CheckpointIndex, before: Stamps) -> None:
    """Check that the model's files are as they were; where only a time differs, by their content if it was recorded.

    Raises:
        InputLostError: If one has changed or is gone; names it, with what it was.
    """
    found, content = stamps(index), index.content
    for name, (size, _) in found.items():
        if size != before[name][0]:
            raise InputLostError(
                f"{index.folder / name} changed while the run lasted: it had {before[name][0]} bytes, now {size}; "
                "restore the model and run again"
            )
    touched = [name for name in found if found[name] != before[name]]
    if touched and (content is None or content.weights is None or content.weights != _weights_now(index)):
        raise InputLostError(
            f"{index.folder / touched[0]} was written to while the run lasted, so its weights may be mixed; "
            "restore the model and run again"
        )
    if content is not None and content.files:
        check_copies(index.folder, content.files)


def check_copies(folder: Path, files: dict[str, str]) -> None:
    """Check that small files of a folder are those that a run began with.

    Raises:
        InputLostError: If one is another or is gone; names it.
    """
    for name, expected in files.items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise InputLostError(
                f"{name} of the model changed while the run lasted, which began with another; restore the model and "
                "run again"
            )


def _weights_now(index: CheckpointIndex) -> str:
    content = ContentRecord()
    content.read(stored_places(index.files), lambda _done, _total: None)
    return weights_hash(index.files, content)
