"""Writing in the background: the same files, bounded memory, and no failure is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import NumericalError
from hawqtool.export.background_writer import BackgroundWriter
from hawqtool.export.layout import plan_layout
from hawqtool.export.writer import CheckpointWriter, intact, unfinished_reader
from hawqtool.records import RoundedLayer
from tests.support.packed_folder import linear_specs, mixed_formats, round_nearest
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "source")


class Controlled(CheckpointWriter):
    """A writer that does something before it writes a tensor."""

    before: Callable[[str], None] = staticmethod(lambda name: None)

    def write(self, name: str, tensor: Tensor) -> None:
        self.before(name)
        super().write(name, tensor)


def prepared(source: Path, folder: Path) -> tuple[Controlled, list[RoundedLayer]]:
    index = read_index(source)
    specs = linear_specs(index)
    formats = mixed_formats(specs)
    reader = TensorReader(index)
    folder.mkdir()
    layers = [round_nearest(name, reader.tensor(f"{name}.weight"), fmt) for name, fmt in formats.items()]
    return Controlled(index, plan_layout(index, formats, specs, 30_000), folder), layers


@pytest.mark.parametrize("pending_bytes", [1, 1 << 29])
def test_files_and_records_are_those_of_a_plain_writer(source: Path, pending_bytes: int, tmp_path: Path) -> None:
    plain, layers = prepared(source, tmp_path / "plain")
    with plain:
        for layer in layers:
            plain.write_layer(layer)
        plain.copy_rest()
    writer, _ = prepared(source, tmp_path / "background")
    with writer, BackgroundWriter(writer, pending_bytes) as background:
        for layer in layers:
            background.write_layer(layer)
    assert list(writer.checksums.items()) == list(plain.checksums.items())
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) > 2
    for name in names:
        assert (tmp_path / "background" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def recorded_once_written(background: BackgroundWriter) -> dict[str, str]:
    """What is recorded of all that was handed over."""
    known: list[dict[str, str]] = []
    called = threading.Event()
    background.when_written(lambda checksums: known.append(checksums) or called.set())  # type: ignore[func-returns-value]
    assert called.wait(900)
    return known[0]


def test_what_is_recorded_is_what_was_handed_over_and_lies_in_the_files(source: Path, tmp_path: Path) -> None:
    writer, layers = prepared(source, tmp_path / "out")
    with writer, BackgroundWriter(writer) as background:
        background.write_layer(layers[0])
        recorded = recorded_once_written(background)
        reader = unfinished_reader(writer._layout, tmp_path / "out")
        assert reader is not None and intact(reader, recorded)
        for layer in layers[1:]:
            background.write_layer(layer)
    assert list(recorded) == [f"{layers[0].name}.weight_{part}" for part in ("packed", "scale", "shape")]
    assert recorded.items() < background.checksums.items() < writer.checksums.items()  # copies are left out


def test_a_tensor_that_changes_late_is_not_copied_before(source: Path, tmp_path: Path) -> None:
    writer, layers = prepared(source, tmp_path / "out")
    name = "model.norm.weight"
    gain = 2 * TensorReader(read_index(source)).tensor(name)
    with writer, BackgroundWriter(writer, copies_ahead=False) as background:
        for layer in layers:
            background.write_layer(layer)
        recorded_once_written(background)
        time.sleep(0.05)  # in which copies ahead would begin
        background.write_changed(name, gain)
    assert writer.changed == {name} and background.checksums[name] == writer.checksums[name]
    reader = unfinished_reader(writer._layout, tmp_path / "out")
    assert reader is not None and reader.tensor(name).equal(gain)


def test_handing_over_waits_for_room_and_a_record_for_all(source: Path, tmp_path: Path) -> None:
    writer, layers = prepared(source, tmp_path / "out")
    gate, handed = threading.Event(), []
    writer.before = lambda name: gate.wait(900) or None  # type: ignore[method-assign, func-returns-value]
    with writer, BackgroundWriter(writer, pending_bytes=1) as background:

        def hand_over() -> None:
            for layer in layers:
                background.write_layer(layer)
                handed.append(layer.name)

        thread = threading.Thread(target=hand_over)
        thread.start()
        time.sleep(0.1)
        assert not handed  # the first layer's second tensor waits for its first one
        gate.set()
        thread.join(900)
        recorded_once_written(background)
        assert {f"{layer.name}.weight_packed" for layer in layers} <= writer.checksums.keys()


@pytest.mark.parametrize("call", ["write_layer", "when_written", "exit"])
def test_a_failure_in_the_thread_is_raised_by_the_next_call(source: Path, call: str, tmp_path: Path) -> None:
    writer, layers = prepared(source, tmp_path / "out")

    def fail(name: str) -> None:
        raise NumericalError(f"no room for {name}")

    writer.before = fail  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match=f"no room for {layers[0].name}"), writer:
        with BackgroundWriter(writer) as background:
            background.write_layer(layers[0])
            while call != "exit" and writing_threads():
                time.sleep(0.01)
            if call == "when_written":
                background.when_written(lambda _: pytest.fail("nothing was written"))
            for layer in layers[1:] if call == "write_layer" else ():
                background.write_layer(layer)
                pytest.fail("the failure was not noticed")
        assert call == "exit", "the failure was lost"
    assert not writing_threads()


def test_a_failure_outside_ends_the_thread(source: Path, tmp_path: Path) -> None:
    writer, layers = prepared(source, tmp_path / "out")
    begun: list[str] = []
    with pytest.raises(KeyboardInterrupt), writer, BackgroundWriter(writer) as background:
        writer.before = lambda name: begun.append(name) or dropped(background)  # type: ignore[method-assign, func-returns-value]
        for layer in layers:
            background.write_layer(layer)
        raise KeyboardInterrupt
    assert len(begun) <= 1  # what waits is dropped
    assert not writing_threads()


def dropped(background: BackgroundWriter) -> None:
    """Wait until the writer was told to end."""
    while not background._dropped:
        time.sleep(0.01)


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "writer"]
