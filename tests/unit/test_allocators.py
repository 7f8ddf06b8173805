"""What is set below torch, and that a user's own settings stay."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hawqtool.cli import allocators

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"


class Heap:
    """Takes the calls that would go to the C library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
        self.set: list[tuple[int, int]] = []
        known = {"mallopt": lambda option, value: self.set.append((option, value))} | functions
        library = SimpleNamespace(**{name: function for name, function in known.items() if function is not None})
        monkeypatch.setattr(allocators.ctypes, "CDLL", lambda _name: library)
        monkeypatch.setenv(VARIABLE, "")  # so that it is put back in the end, whatever it was
        for name in list(os.environ):
            if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "PYTORCH_")):
                monkeypatch.delenv(name)


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap(monkeypatch)
    allocators.prepare_allocators()
    assert heap.set == [(-3, 8 << 20), (-1, 64 << 20)]
    assert os.environ[VARIABLE] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_heap_that_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap(monkeypatch)
    monkeypatch.setenv(name, "1")
    allocators.prepare_allocators()
    assert heap.set == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Heap(monkeypatch, mallopt=None)
    allocators.prepare_allocators()


@pytest.mark.parametrize("name", [VARIABLE, "PYTORCH_ALLOC_CONF"])
def test_a_gpu_allocator_that_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Heap(monkeypatch)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    allocators.prepare_allocators()
    assert os.environ.get(VARIABLE) == ("max_split_size_mb:64" if name == VARIABLE else None)


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_the_c_library_takes_the_settings() -> None:
    # In a process of its own: they cannot be taken back.
    code = "from hawqtool.cli.allocators import prepare_allocators as p; p(); print(len(bytearray(100 << 20)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(100 << 20), done.stderr
