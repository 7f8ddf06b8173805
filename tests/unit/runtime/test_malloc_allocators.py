"""What is set below torch, and that a user's own settings stay."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hawqtool.runtime import malloc as allocators
from hawqtool.runtime import malloc as heap

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
PREPARED = [(-4, 1 << 16), (-3, 8 << 20), (-1, 64 << 20)]


class Heap:
    """Takes the calls that would go to the C library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set: list[tuple[int, int]] = []
        monkeypatch.setattr(heap, "_set", lambda option, value: self.set.append((option, value)))
        monkeypatch.setenv(VARIABLE, "")  # so that it is put back in the end, whatever it was
        for name in list(os.environ):
            if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "PYTORCH_")):
                monkeypatch.delenv(name)


def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Heap(monkeypatch)
    allocators.configure_allocators()
    assert calls.set == PREPARED
    assert os.environ[VARIABLE] == "expandable_segments:True"


def test_sweeps_keep_all_and_leave_the_heap_as_the_command_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Heap(monkeypatch)
    with pytest.raises(ZeroDivisionError), heap.kept_pages():
        assert calls.set == [(-4, 0), (-1, (1 << 31) - 1)]
        raise ZeroDivisionError
    assert calls.set[2:] == PREPARED


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_heap_that_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Heap(monkeypatch)
    monkeypatch.setenv(name, "1")
    allocators.configure_allocators()
    with heap.kept_pages():
        pass
    assert calls.set == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Heap(monkeypatch)
    monkeypatch.setattr(heap, "_set", None)
    monkeypatch.setattr(heap, "_trim", None)
    allocators.configure_allocators()
    with heap.kept_pages():
        pass


@pytest.mark.parametrize("name", [VARIABLE, "PYTORCH_ALLOC_CONF"])
def test_a_gpu_allocator_that_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Heap(monkeypatch)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    allocators.configure_allocators()
    assert os.environ.get(VARIABLE) == ("max_split_size_mb:64" if name == VARIABLE else None)


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_the_c_library_takes_the_settings() -> None:
    # In a process of its own: they cannot be taken back.
    code = "from hawqtool.runtime.malloc import configure_allocators as p; p(); print(len(bytearray(100 << 20)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(100 << 20), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_a_sweep_waits_for_no_new_pages() -> None:
    # In a process of its own, whose heap holds nothing else.
    code = """
import os, resource
from hawqtool.runtime.malloc import kept_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        bytearray(48 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages = (48 << 20) // os.sysconf("SC_PAGE_SIZE")
with kept_pages():
    faults()
    inside = faults()
print(inside < 0.1 * pages, faults() > 2 * pages)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr
