"""The hidden states of a walk on disk now and then, so that an interrupted walk need not begin at the first block."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableSequence

import torch
from torch import Tensor

from hawqtool.runtime.store import BYTES_PER_SECOND, NOTHING_SAVED, Saved
from hawqtool.streaming.offload import total_bytes

LEAST_SECONDS = 3.0
"""Between two times that states are kept."""


_SMALL_BYTES = 16 << 20
"""What is kept at every step, however fast the steps are."""

_LAST = "last"

States = Mapping[str, MutableSequence[Tensor]]
"""Hidden states of a walk by name, a tensor per batch."""


class Pace:
    """How often a growing result of a walk may be kept, so that this costs little beside the walk itself."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def is_due(self, size: int) -> bool:
        """Whether so many bytes may be written now; if so, the next ones have to wait for their size."""
        now = time.monotonic()
        if size > _SMALL_BYTES and now - self._since < size / BYTES_PER_SECOND:
            return False
        self._since = now
        return True


class ResumePoints:
    """Keeps the states of a walk at some of its blocks; those at the latest are there at every moment.

    Args:
        saved: Where they are kept.
        device: Where the walk needs them.
    """

    def __init__(self, saved: Saved, device: torch.device) -> None:
        self._saved, self._device = saved, device
        self._since = time.monotonic()

    def restore(self, states: States, most: int) -> int:
        """Replace the states before the first block by the latest that were kept.

        Args:
            states: Replaced batch by batch.
            most: Number of blocks that may be left out of the walk.

        Returns:
            Number of blocks that lie behind the states, 0 where none were kept or more than ``most`` lie there.
        """
        blocks = self._saved.load(_LAST) or 0
        if blocks > most:
            return 0
        keys = [_key(blocks, name, i) for name, batches in states.items() if blocks for i in range(len(batches))]
        # All of them are looked at before any takes the place of a state: one may be damaged.
        if any(self._saved.load(key) is None for key in keys):
            self._saved.drop(_LAST, *keys)
            return 0
        for name, batches in states.items() if blocks else ():
            for position in range(len(batches)):
                batches[position] = self._saved.load(_key(blocks, name, position)).to(self._device)
        return int(blocks)

    def keep(self, blocks: int, states: States) -> None:
        """Keep the states behind so many blocks, if the last ones are old enough for their size."""
        size = sum(total_bytes(batches) for batches in states.values())
        if self._saved is NOTHING_SAVED or time.monotonic() - self._since < max(LEAST_SECONDS, size / BYTES_PER_SECOND):
            return
        earlier = self._saved.load(_LAST)
        for name, batches in states.items():
            for position, state in enumerate(batches):
                self._saved.save(_key(blocks, name, position), state)
        self._saved.save(_LAST, blocks)  # when all of them are there
        if earlier not in (None, 0, blocks):
            self._saved.drop(*(_key(earlier, name, i) for name, batches in states.items() for i in range(len(batches))))
        self._since = time.monotonic()


def _key(blocks: int, name: str, position: int) -> str:
    return f"{blocks}-{name}-{position}"
