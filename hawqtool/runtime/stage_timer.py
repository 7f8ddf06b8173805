"""Seconds by stage inside a walk: nothing is recorded unless a recorder is handed in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from hawqtool.runtime.malloc import release_freed_pages
from hawqtool.runtime.store import Saved

LEAST_SECONDS = 1.0
"""What may be missing of the times of a run that is killed, besides those of the stage that it was in."""

_TIMINGS = "timings"


class Recorder(Protocol):
    """Takes note of the stages that a walk goes through."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """What runs in the context belongs to a stage; a stage inside another one takes its time from it."""


class Unrecorded:
    """Records nothing; has no state, so one instance serves all."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A context that does nothing."""
        return nullcontext()


UNRECORDED = Unrecorded()


class StageRecorder:
    """Seconds by stage on a device, for one thread.

    On a GPU the moments are events in its queue, so nothing waits while it records; where the GPU idles because the
    host is late, the wait counts for the stage in which it arises. The seconds of all stages add up to the time
    between the first moment and the last, stages that are entered from none aside.

    Args:
        device: Where the walk computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._moments: list[tuple[Any, str | None]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs in the context belongs to a stage; a stage inside another one takes its time from it."""
        self._open.append(name)
        self._note(name)
        try:
            yield
        finally:
            self._open.pop()
            self._note(self._open[-1] if self._open else None)

    def _note(self, begins: str | None) -> None:
        if self._device.type == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self._device))
        else:
            moment = time.perf_counter()
        self._moments.append((moment, begins))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, in the order in which the stages first came; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        totals: dict[str, float] = {}
        for (start, name), (end, _) in zip(self._moments, self._moments[1:], strict=False):
            if name is not None:
                spent = start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
                totals[name] = totals.get(name, 0.0) + spent
        return totals


class Timings(dict[str, float]):
    """Seconds by stage of a run, over all its starts.

    Args:
        saved: Where they are kept; what an earlier start has kept is what they begin with.
    """

    def __init__(self, saved: Saved) -> None:
        super().__init__(saved.load(_TIMINGS) or {})
        self._saved, self._unsaved = saved, 0.0

    def add(self, stage: str, seconds: float, failed: bool = False) -> None:
        """Add to a stage, and keep all where enough has come together; not where the stage failed, as the disk may."""
        self[stage] = self.get(stage, 0.0) + seconds
        self._unsaved += seconds
        if self._unsaved >= LEAST_SECONDS and not failed:
            self.save()

    def save(self) -> None:
        """Keep them for a start that goes on."""
        self._saved.save(_TIMINGS, dict(self))
        self._unsaved = 0.0


class Stopwatch:
    """Adds the seconds of a block of code to a stage, also where the block is interrupted."""

    def __init__(self, timings: Timings, stage: str) -> None:
        self.timings, self.stage = timings, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        release_freed_pages()  # the next stage needs other sizes
        failed = kind is not None and issubclass(kind, Exception)  # an interrupt is none
        self.timings.add(self.stage, time.perf_counter() - self.start, failed)
