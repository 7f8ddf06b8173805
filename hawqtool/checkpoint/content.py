"""Content record of a checkpoint: SHA-256 of what was read of its files, compared whenever it is read again.

A run reads its weights many times over hours. Sizes and times of files say little of what is in them, so that every
read is hashed; processors have instructions for SHA-256, which takes about as long as copying the bytes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from hawqtool.errors import InputLostError

Place = tuple[Path, int, int]
"""File, first byte and number of bytes."""

_PIECE_BYTES = 16 << 20
_THREADS = min(16, os.cpu_count() or 1)


class ContentRecord:
    """SHA-256 by place of what was read; several threads may use it at a time.

    Attributes:
        weights: Hash of all weights, see `record_weights`; None before it was made.
        files: SHA-256 by name of the small files beside the weights; empty before they were read.
    """

    def __init__(self) -> None:
        self.weights: str | None = None
        self.files: dict[str, str] = {}
        self._digests: dict[Place, bytes] = {}

    def __getitem__(self, place: Place) -> bytes:
        return self._digests[place]

    def check(self, place: Place, digest: bytes, name: str) -> None:
        """Record what was read at a place, or compare it with what was read there before.

        Raises:
            InputLostError: If it differs; ``name`` says which tensor lies there.
        """
        if self._digests.setdefault(place, digest) != digest:
            raise InputLostError(
                f"tensor {name} of {place[0]} changed while the run lasted; its content was another before; restore "
                "the model and run again"
            )

    def take_over(self, other: ContentRecord) -> None:
        """Record what another process has recorded.

        Raises:
            InputLostError: If what this one has read meanwhile differs.
        """
        for place, digest in other._digests.items():
            self.check(place, digest, f"at byte {place[1]}")
        self.weights, self.files = other.weights, other.files

    def read(
        self, places: Iterable[Place], progress: Callable[[int, int], None], stop: threading.Event | None = None
    ) -> None:
        """Read and record places that are not recorded yet, several at a time.

        Args:
            places: Where to read.
            progress: Called with the number of places that are done and of all.
            stop: Set from elsewhere it ends the reading; what was read until then is recorded.

        Raises:
            InputLostError: If a file cannot be read.
        """
        wanted = [place for place in dict.fromkeys(places) if place not in self._digests]
        stop = stop or threading.Event()
        with ThreadPoolExecutor(_THREADS, "content") as threads:
            try:
                tasks = [threads.submit(self._read, place, stop) for place in wanted]
                for done, task in enumerate(as_completed(tasks), 1):
                    task.result()
                    progress(done, len(tasks))
            finally:
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, place: Place, stop: threading.Event) -> None:
        if place in self._digests:  # another thread has read it since
            return
        file, start, left = place
        digest = hashlib.sha256()
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(start)
                while left and not stop.is_set():
                    piece = stream.read(min(left, _PIECE_BYTES))
                    if not piece:
                        raise InputLostError(f"{file} ended early; download or save it again")
                    digest.update(piece)
                    left -= len(piece)
        except OSError as error:
            raise InputLostError(f"{file} cannot be read ({error.strerror}); check the disk") from None
        if not left:
            self._digests[place] = digest.digest()
