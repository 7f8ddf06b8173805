"""What a machine can do: rates of products, memory and disk by short probes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_REPEATS = 5
_DISK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_CHUNK_BYTES = 1 << 26
_SIZES = {
    "cpu": {torch.bfloat16: 1024, torch.float32: 2048, torch.float64: 1024},
    "cuda": {torch.bfloat16: 8192, torch.float32: 8192, torch.float64: 4096},
}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second.

    Args:
        bfloat16: Floating-point operations of a matrix product.
        float32: The same.
        coarse: The same for float32 matrices where TF32 will do; float32's on a CPU.
        float64: The same.
        memory: Bytes read and written by a copy in the device's memory.
        to_device: Bytes copied from pinned host memory; a copy in memory on a CPU.
        disk_read: Bytes of a file that is not in the page cache.
        disk_write: Bytes of a file, on the disk at the end.
    """

    bfloat16: float
    float32: float
    coarse: float
    float64: float
    memory: float
    to_device: float
    disk_read: float
    disk_write: float

    def of(self, dtype: torch.dtype) -> float:
        """Rate of matrix products in a dtype; float16 counts as bfloat16."""
        return {torch.float32: self.float32, torch.float64: self.float64}.get(dtype, self.bfloat16)

    def record(self) -> dict[str, float]:
        """JSON form."""
        return asdict(self)


def measure_rates(device: torch.device, folder: Path) -> Rates:
    """Rates of a device, and of the disk behind a folder."""
    bfloat16, float32, float64 = (_product_rate(device, *probe) for probe in _SIZES[device.type].items())
    write, read = _disk_rates(folder, _DISK_BYTES[device.type])
    coarse = float32
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        coarse = _product_rate(device, torch.float32, _SIZES["cuda"][torch.float32])
        torch.set_float32_matmul_precision(before)
    return Rates(bfloat16, float32, coarse, float64, _copy_rate(device), _transfer_rate(device), read, write)


def _best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS + 1):  # the first one loads kernels
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    # Zeros would draw less power than real values and so run faster.
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(device, lambda: first @ second)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _best_seconds(device, lambda: target.copy_(source))


def _transfer_rate(device: torch.device) -> float:
    pinned = device.type == "cuda"
    source = torch.ones(1 << 28, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(len(source), dtype=torch.uint8, device=device)
    return len(source) / _best_seconds(device, lambda: target.copy_(source, non_blocking=True))


def _disk_rates(folder: Path, size: int) -> tuple[float, float]:
    """Rates of writing and of reading a file."""
    path = folder / f".probe-{os.getpid()}"
    chunk = os.urandom(_CHUNK_BYTES)
    try:
        start = time.perf_counter()
        with path.open("wb", buffering=0) as stream:
            for _ in range(size // len(chunk)):
                stream.write(chunk)
            os.fsync(stream.fileno())
        write = size / (time.perf_counter() - start)
        evict(path)
        start = time.perf_counter()
        buffer = bytearray(_CHUNK_BYTES)
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
        return write, size / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def evict(path: Path) -> None:
    """Drop a file's clean pages from the page cache, where the system can, so that reading it means the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
