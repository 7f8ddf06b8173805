"""Reading ahead changes when weights are read, never which."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.prefetch import Prefetcher
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.pipeline.run.job import prepare
from tests.support.tiny import tiny_llama

LAYERS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "source", layers=LAYERS)


class Watched(TensorReader):
    """Notes what the main thread reads itself, and what other threads do."""

    def __init__(self, folder: Path) -> None:
        super().__init__(read_index(folder))
        self.here: list[str] = []
        self.ahead: list[str] = []

    def tensor(self, name: str, pinned: bool = False) -> Tensor:
        (self.here if threading.current_thread() is threading.main_thread() else self.ahead).append(name)
        return super().tensor(name, pinned)


def block_of(name: str) -> int:
    return int(name.split(".")[2])


@pytest.mark.parametrize("order", [range(LAYERS), reversed(range(LAYERS))], ids=["forward", "reverse"])
def test_a_walk_reads_ahead_in_its_direction(source: Path, order: range) -> None:
    job = prepare(RunConfig(model=str(source), device="cpu"))
    watched = Watched(source)
    stream, plain = job.stream(Prefetcher(watched)), job.stream()
    watched.here.clear()
    watched.ahead.clear()
    for index in (walked := list(order)):
        with stream.block(index) as block, plain.block(index) as expected:
            for name, parameter in expected.module.named_parameters():
                assert torch.equal(block.module.get_parameter(name), parameter), name
    # The first block is read when it is needed; a reverse walk shows its direction with the second one.
    waited = walked[:1] if walked[0] == 0 else walked[:2]
    assert {block_of(name) for name in watched.here} == set(waited)
    assert {block_of(name) for name in watched.ahead} >= set(walked) - set(waited)


def test_what_fails_ahead_of_time_is_raised_when_it_is_asked_for(source: Path) -> None:
    prefetcher = Prefetcher(TensorReader(read_index(source)))
    prefetcher.expect(["model.norm.weight", "no.such.tensor"])
    assert prefetcher.tensor("model.norm.weight").shape == (64,)
    with pytest.raises(InputError, match=r"no\.such\.tensor is not in"):
        prefetcher.tensor("no.such.tensor")


def test_what_was_expected_and_not_asked_for_is_dropped(source: Path) -> None:
    reader = TensorReader(read_index(source))
    names = [name for name in reader.index.tensors if ".layers.0." in name]
    prefetcher = Prefetcher(reader)
    prefetcher.expect(names)
    prefetcher.expect(names[:1])
    assert set(prefetcher._expected) == set(names[:1])
    assert torch.equal(prefetcher.tensor(names[1]), reader.tensor(names[1]))
