"""Hidden states lie where there is room, come back to the bit, and are let go."""

from __future__ import annotations

import gc
from copy import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hawqtool.errors import ResourceError
from hawqtool.streaming import offload as spill
from hawqtool.streaming.offload import DEVICE, DISK, HOST, Offload, OffloadedBatches, total_bytes

CPU = torch.device("cpu")
SIZE = 4096


def tensor(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.randn(2, SIZE // 2 // dtype.itemsize, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def spilled(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "CHUNK_BYTES", SIZE // 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_device_then_host_then_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    offload = Offload(CPU, 2 * SIZE, SIZE, tmp_path)
    values = [tensor(seed, dtype) for seed in range(5)]
    kept = OffloadedBatches(offload, values)
    assert offload.peak_bytes == {DEVICE: 2 * SIZE, HOST: SIZE, DISK: 2 * SIZE}
    assert len(spilled(tmp_path)) == 2
    for found, expected in zip(kept, values, strict=True):
        assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("place", [HOST, DISK])
def test_the_last_chunk_may_be_filled_in_part(place: str, tmp_path: Path) -> None:
    offload = Offload(CPU, 0, 2 * SIZE if place == HOST else 0, tmp_path)
    value = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))[:, :437]  # a view with gaps
    kept = OffloadedBatches(offload, [value, value[:0]])
    assert torch.equal(kept[0], value) and kept[1].shape == (0, 437)
    assert offload.peak_bytes[place] == {HOST: 6 * SIZE // 4, DISK: value.nbytes}[place]


def test_a_replaced_entry_makes_room_for_the_next(tmp_path: Path) -> None:
    offload = Offload(CPU, SIZE, 0, tmp_path)
    kept = OffloadedBatches(offload, [tensor(0), tensor(1)])
    for seed in range(2, 6):
        kept[0], kept[1] = tensor(seed), tensor(seed + 10)
        assert torch.equal(kept[0], tensor(seed)) and torch.equal(kept[1], tensor(seed + 10))
    assert offload.peak_bytes == {DEVICE: SIZE, HOST: 0, DISK: SIZE}
    assert len(spilled(tmp_path)) == 1


def test_a_copy_keeps_what_the_original_replaces(tmp_path: Path) -> None:
    kept = OffloadedBatches(Offload(CPU, SIZE, 0, tmp_path), [tensor(0), tensor(1)])
    before = copy(kept)
    kept[0], kept[1] = tensor(2), tensor(3)
    assert torch.equal(before[0], tensor(0)) and torch.equal(before[1], tensor(1))
    assert torch.equal(kept[0], tensor(2)) and torch.equal(kept[1], tensor(3))
    del before, kept
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_sizes_are_known_without_reading(tmp_path: Path) -> None:
    kept = OffloadedBatches(Offload(CPU, SIZE, 0, tmp_path), [tensor(0), tensor(1)])
    spilled(tmp_path)[0].unlink()
    assert total_bytes(kept) == total_bytes([tensor(0), tensor(1)]) == 2 * SIZE


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"missing refuses them.*--max-memory"):
        OffloadedBatches(Offload(CPU, 0, 0, tmp_path / "missing"), [tensor(0)])


@pytest.mark.parametrize("damage", ["short", "first chunk", "last chunk"])
def test_a_file_that_was_damaged(tmp_path: Path, damage: str) -> None:
    kept = OffloadedBatches(Offload(CPU, 0, 0, tmp_path), [tensor(0)])
    (file,) = spilled(tmp_path)
    content = bytearray(file.read_bytes())
    content[3 if damage == "first chunk" else -1] ^= 1
    file.write_bytes(b"short" if damage == "short" else content)
    said = "ended early" if damage == "short" else "differ from their checksum"
    with pytest.raises(ResourceError, match=rf"cannot be read back \(.*{said}\); check the disk"):
        kept[0]


def test_room_that_others_fill_is_counted(tmp_path: Path) -> None:
    offload = Offload(torch.device("cpu"), 100, 0, tmp_path)
    room = offload.reserve(60)
    assert room is not None and offload.reserve(60) is None
    assert offload.store(torch.zeros(60, dtype=torch.uint8)).load().sum() == 0 and offload.peak_bytes["disk"] == 60
    del room
    assert offload.reserve(100) is not None and offload.peak_bytes["device"] == 100
