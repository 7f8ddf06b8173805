"""Expected failures, each with the exit code that belongs to it.

A message says what was found, what was expected and what to do next.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""What the system says when a disk is full, read-only, too small for a file, or broken."""


class HawqError(Exception):
    """Base of every expected failure; ``exit_code`` is part of the command line's interface."""

    exit_code = 1


class UsageError(HawqError):
    """Wrong options or configuration, an infeasible size target, an output folder that may not be used."""

    exit_code = 2


class QualityError(HawqError):
    """A quality gate failed; the output exists.

    Args:
        message: All of them in one line.
        failed: A line for each.
    """

    exit_code = 3

    def __init__(self, message: str, failed: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.failed = failed


class InputError(HawqError):
    """A checkpoint, a text or a record that cannot be used, or a model that is not supported."""

    exit_code = 4


class InputLostError(InputError):
    """Files of the input changed or could not be read under way: once they are restored, saved work can go on."""


class SamplingError(InputError):
    """Transformers cannot load a model to sample rows from it, or cannot sample them."""


class NumericalError(HawqError):
    """A numerical, memory or disk failure during the work."""

    exit_code = 5


class ResourceError(NumericalError):
    """The disk or the memory gave out: with more of it, the work that was saved can be gone on with."""


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn the system's errors while writing to a file or folder into a ResourceError of one line.

    Raises:
        ResourceError: For any OSError.
    """
    try:
        yield
    except OSError as error:
        raise ResourceError(f"writing to {place} failed: {_disk_reason(place, error)}") from error


def _disk_reason(place: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next((p for p in (place, *place.parents) if p.exists()), None)
        free = shutil.disk_usage(existing).free if existing else 0
        return f"the disk is full ({free} bytes free); free some space or choose another output"
    return f"{error.strerror or error}; check that the folder exists and can be written"


def one_line(error: BaseException) -> str:
    """The gist of a library's error, whose message may have many lines: the first, with what a colon announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, (LookupError, ArithmeticError, AttributeError, TypeError)):
        text = f"{type(error).__name__}: {text}"
    return text.rstrip(":,; ")
