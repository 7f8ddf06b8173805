"""Peak memory of a stretch of work, on the host and on the device."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_SECONDS = 0.02
_COUNTED = ("RssAnon:", "RssShmem:")
"""Pages of the process itself, and shared ones such as pinned memory; pages of mapped files are left out."""


class PeakMemory:
    """Watches memory while its context lasts.

    The host's is sampled every 20 ms by a thread, so a shorter peak may be missed; the device's is the allocator's
    own record.

    Args:
        device: Where the work computes.

    Attributes:
        host_bytes: Most anonymous memory of the process, all of it counted; None where the system does not tell.
        device_bytes: Most memory of tensors on the device; None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.host_bytes: int | None = None
        self.device_bytes: int | None = None
        self._device = device
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._sample()
        if self._device.type == "cuda":
            self.device_bytes = torch.cuda.max_memory_allocated(self._device)

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._sample()

    def _sample(self) -> None:
        found = anonymous_bytes()
        if found is not None:
            self.host_bytes = max(found, self.host_bytes or 0)


def anonymous_bytes() -> int | None:
    """Bytes of the process that no file backs; None where the system has no such record."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith(_COUNTED)]
    return 1024 * sum(found) if found else None
