"""Seconds and memory of a measurement, beside those of a plain forward and backward pass."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hawqtool.pipeline.run.job import Job
from hawqtool.records import Rows

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
PLAIN_ROWS = 4
"""Rows per plain forward and backward pass, whose graph is held whole."""


class Meter:
    """Context that measures wall seconds and the peak of memory.

    ``bytes`` is what torch had allocated on a GPU at most, all of it, or on a CPU the peak resident size of the
    process (``VmHWM``), which the interpreter and its libraries are part of; Linux alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.bytes = device, 0.0, 0

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _CLEAR.write_text(_RESET_PEAK)
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            self.bytes = int(line.split()[1]) * 1024
        self.seconds = time.perf_counter() - self.start

    @property
    def record(self) -> dict[str, Any]:
        """JSON form."""
        return {"seconds": self.seconds, "peak_bytes": self.bytes}


def forward_backward(job: Job, rows: Rows) -> dict[str, Any]:
    """Cost of one forward and backward pass over the rows, with gradients of all weights of the blocks.

    The model is held whole; loading it is not counted, and a first pass warms up.
    """
    stream = job.stream()
    blocks = stream.structure.blocks
    with stream.keeping_pages(), ExitStack() as resident, torch.enable_grad():
        loaded = [resident.enter_context(stream.block(spec.index)) for spec in blocks]
        for block in loaded:
            block.module.requires_grad_(True)
        parts = rows.tokens.split(min(PLAIN_ROWS, job.settings.batch_size))

        def once(part: torch.Tensor) -> None:
            activations = stream.embed(part, len(part))
            hidden = activations.hidden[0]
            for block in loaded:
                hidden = block.run(hidden, activations.calls[0][block.spec.index])
            outputs = stream.outputs(part, hidden).float()
            # Any loss of all outputs will do.
            (-outputs.log_softmax(-1)[..., 0].sum() if job.task.logits else outputs.square().sum()).backward()

        once(parts[0])
        with Meter(job.device) as meter:
            for part in parts:
                once(part)
        return meter.record | {"rows": len(rows.tokens)}
