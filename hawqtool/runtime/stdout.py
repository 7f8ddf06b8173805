"""The standard streams: clean of what compiled libraries print, and able to take any character."""

from __future__ import annotations

import codecs
import ctypes
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT = 1


@contextmanager
def stdout_discarded() -> Iterator[None]:
    """Send what C code writes to the process's stdout nowhere.

    HiGHS has prints that none of its options turns off (it repairs a rounded solution, and says so); they would end
    up in the JSON on stdout. They wait in C's buffer, which must be emptied before the descriptor is put back.
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept = os.dup(_STDOUT)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, _STDOUT)
        os.close(kept)


_SPELLED = {"±": "+-", "×": "x", "−": "-", "–": "-", "—": "-", "…": "...", "’": "'", "→": "->", "≤": "<=", "≥": ">="}
_HANDLER = "hawqtool.spelled"


def accept_any_character() -> None:
    """Let stdout and stderr write what their encoding lacks in plainer characters, instead of failing."""
    codecs.register_error(_HANDLER, _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)  # of these streams nothing is read
    characters = error.object[error.start : error.end]
    return "".join(map(_plain, characters)), error.end


def _plain(character: str) -> str:
    simple = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _SPELLED.get(character) or simple or character.encode("unicode_escape").decode("ascii")


def flush_streams() -> bool:
    """Write out what stdout and stderr still hold; False where the reader of one is gone, whose rest is dropped."""
    whole = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            whole = False
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # else Python would try again, and complain, as it ends
            os.close(nowhere)
    return whole
