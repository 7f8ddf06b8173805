"""Writing rounded layers in a thread of its own, while the next ones are rounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hawqtool.export.stored.weights import packed_tensors
from hawqtool.export.writer import CheckpointWriter
from hawqtool.records import RoundedLayer

PENDING_BYTES = 1 << 29
"""Most bytes that wait to be written; a larger tensor waits alone."""
_MOST_SECONDS = 5.0
"""Most seconds that leaving after an exception waits for the tensor that is being written."""


@dataclass(frozen=True)
class _Waiting:
    """A tensor on its way.

    Args:
        name: Its name in the checkpoint.
        tensor: Its value.
        ready: Tells when a copy from the device has arrived; None where it is here.
        changed: Whether it takes the place of one of the source.
    """

    name: str
    tensor: Tensor
    ready: torch.cuda.Event | None
    changed: bool


class BackgroundWriter:
    """Hashes and writes in a thread what it is given, and copies unquantized tensors while it has nothing else to do.

    A context manager inside that of the writer, which must not be used meanwhile: leaving the context without an
    exception waits until everything is written. What fails in the thread is raised here by the next call.

    Args:
        writer: Writes the tensors.
        pending_bytes: Most bytes that wait; `write_layer` waits for room.
        copies_ahead: Whether tensors are copied from the source at any time, or not before all else is written:
            `write_changed` may name any of them until then.

    Attributes:
        checksums: SHA-256 by name of what was handed over and is written, in that order.
    """

    def __init__(self, writer: CheckpointWriter, pending_bytes: int = PENDING_BYTES, copies_ahead: bool = True) -> None:
        self.checksums: dict[str, str] = {}
        self._writer, self._most, self._ahead = writer, pending_bytes, copies_ahead
        self._waiting: deque[_Waiting | Callable[[dict[str, str]], None]] = deque()
        self._bytes = 0
        self._ended = self._dropped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended, self._dropped = True, kind is not None
            self._changed.notify_all()
        # A thread that hangs, as on a disk that does not answer, must not keep a process that is to end.
        self._thread.join(None if kind is None else _MOST_SECONDS)
        if kind is None and self._error is not None:
            raise self._error

    def write_layer(self, layer: RoundedLayer) -> None:
        """Pack a layer and hand it over; returns before it is written.

        Raises:
            HawqError: If an earlier tensor could not be written.
        """
        for name, tensor in packed_tensors(layer).items():
            self._hand_over(_on_host(name, tensor))

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Hand over a tensor of the layout that is no copy; it must not change any more.

        Raises:
            HawqError: If an earlier tensor could not be written.
        """
        self._hand_over(_on_host(name, tensor))

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """Hand over a tensor that takes the place of the source's of that name; it must not change any more.

        Raises:
            HawqError: If an earlier tensor could not be written.
        """
        self._hand_over(_on_host(name, tensor, changed=True))

    def when_written(self, record: Callable[[dict[str, str]], None]) -> None:
        """Have the thread call ``record(checksums)`` once everything that was handed over so far is written.

        It is not called where the context is left with an exception before that.

        Raises:
            HawqError: If a tensor could not be written, or an earlier record be made.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting.append(record)
            self._changed.notify_all()

    def _hand_over(self, item: _Waiting) -> None:
        size = item.tensor.nbytes
        with self._changed:
            self._changed.wait_for(
                lambda: self._bytes == 0 or self._bytes + size <= self._most or self._error is not None
            )
            if self._error is not None:
                raise self._error
            self._waiting.append(item)
            self._bytes += size
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            copies = deque(self._writer.copies() if self._ahead else ())
            while (item := self._next(wait=not copies)) is not None or (copies and not self._dropped):
                if item is None:
                    self._writer.copy(copies.popleft())
                elif isinstance(item, _Waiting):
                    self._write(item)
                else:
                    item(dict(self.checksums))
            if not self._dropped:
                self._writer.copy_rest()
        except BaseException as error:  # raised again in the thread that waits for it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _write(self, item: _Waiting) -> None:
        if item.ready is not None:
            item.ready.synchronize()
        (self._writer.write_changed if item.changed else self._writer.write)(item.name, item.tensor)
        with self._changed:
            self.checksums[item.name] = self._writer.checksums[item.name]
            self._bytes -= item.tensor.nbytes
            self._changed.notify_all()

    def _next(self, wait: bool) -> _Waiting | Callable[[dict[str, str]], None] | None:
        """The next tensor or record; None where there is none, which ends the work when all copies are made."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: bool(self._waiting) or self._ended)
            if self._dropped or not self._waiting:
                return None
            return self._waiting.popleft()


def _on_host(name: str, tensor: Tensor, changed: bool = False) -> _Waiting:
    """A tensor on its way to the host; from a GPU it is copied to page-locked memory, which nothing waits for."""
    if not tensor.is_cuda:
        return _Waiting(name, tensor, None, changed)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(tensor.device))
    return _Waiting(name, host, ready, changed)
