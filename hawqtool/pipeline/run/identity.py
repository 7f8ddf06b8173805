"""What makes two runs the same run, and whether the model's files are still those that the run began with."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hawqtool import __version__
from hawqtool.checkpoint.index import CheckpointIndex, fingerprint
from hawqtool.config import SETTINGS, names_affecting
from hawqtool.data.sources import public_name
from hawqtool.errors import InputLostError
from hawqtool.pipeline.run.files import file_hash
from hawqtool.pipeline.run.job import Job
from hawqtool.settings import Affects

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy")
_WITHOUT_EFFECT = (Affects.PLACE, Affects.GATES)
_IN_ANOTHER_FORM = (Affects.MODEL, Affects.MACHINE)
_SAMPLED_PIECES, _PIECE_BYTES = 64, 4096

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
    values["eval_data"] = public_name(config.eval_data) if config.eval_data else None
    found = job.settings
    values |= {"num_samples": found.num_samples, "seq_len": found.seq_len, "batch_size": found.batch_size}
    cuda = job.device.type == "cuda"
    machine = torch.cuda.get_device_name(job.device) if cuda else f"cpu with {torch.get_num_threads()} threads"
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return values | {
        "model": fingerprint(job.index),
        "weights": sampled_hash(job.index),
        "device": machine,
        "hawqtool": __version__,
        **versions,
    }


def sampled_hash(index: CheckpointIndex) -> str:
    """SHA-256 of evenly spaced pieces of every weight file: other weights of the same shapes differ in it.

    Raises:
        InputLostError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in index.files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                for number in range(_SAMPLED_PIECES):
                    stream.seek(number * max(size - _PIECE_BYTES, 0) // (_SAMPLED_PIECES - 1))
                    digest.update(stream.read(_PIECE_BYTES))
    except OSError as error:
        raise InputLostError(f"{index.folder} cannot be read ({error.strerror}); check the disk") from None
    return digest.hexdigest()


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
    """Check that the model's files are as they were.

    Raises:
        InputLostError: If one has changed or is gone; names it, with what it was.
    """
    for name, (size, changed) in stamps(index).items():
        was_size, was_changed = before[name]
        if size != was_size:
            raise InputLostError(
                f"{index.folder / name} changed while the run lasted: it had {was_size} bytes, now {size}; "
                "restore the model and run again"
            )
        if changed != was_changed:
            raise InputLostError(
                f"{index.folder / name} was written to while the run lasted, so its weights may be mixed; "
                "restore the model and run again"
            )
