"""Saved work and the folder that holds it: complete or absent, one run at a time, never of another run."""

from __future__ import annotations

import errno
import math
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from hawqtool.errors import InputError, InputLostError, NumericalError, ResourceError, UsageError
from hawqtool.pipeline.run.checkpoints import Checkpoints
from hawqtool.pipeline.run.folder import RunFolder
from hawqtool.runtime.reporter import Silent

CONTENT = {
    "numbers": [1, -2.5, 1e-300, 0.1, None, True, "text"],
    "nested": {"a": {"b": [torch.arange(6).view(2, 3), torch.tensor([0.1, math.nan], dtype=torch.bfloat16)]}},
    "none": torch.empty(0, 4),
    "one": torch.tensor(3.5, dtype=torch.float64),
    "view": torch.arange(12.0).view(3, 4).t(),
}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and type(a) is type(b)


def test_contents_come_back_to_the_bit(saved: Checkpoints) -> None:
    saved.save("key", CONTENT)
    assert same(saved.load("key"), CONTENT)
    assert saved.load("other") is None


def test_parts_have_keys_of_their_own(saved: Checkpoints) -> None:
    part = saved.part("a")
    for number, store in enumerate((saved, part, part.part("b"), saved.part("ab"))):
        store.save("key", number)
    assert [s.load("key") for s in (saved, part, part.part("b"), saved.part("ab"))] == [0, 1, 2, 3]
    part.drop()
    assert saved.keys() == ["ab.key", "key"]


def test_a_full_disk_leaves_the_earlier_content(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.save("key", 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        saved.save("key", 2)
    assert saved.load("key") == 1
    assert [path.name for path in saved.folder.iterdir()] == ["key.state"]


def damaged(saved: Checkpoints, key: str, content: bytes) -> bool:
    """Whether a file of such bytes gives nothing, says so once, and is removed."""
    said: list[str] = []
    saved.warn = said.append
    path = saved.folder / f"{key}.state"
    path.write_bytes(content)
    return saved.load(key) is None and not path.exists() and len(said) == 1 and f"{path}, which" in said[0]


@pytest.mark.parametrize("length", [0, 5, 30, -1])
def test_cut_files_are_not_believed(saved: Checkpoints, length: int) -> None:
    saved.save("key", CONTENT)
    content = (saved.folder / "key.state").read_bytes()
    assert damaged(saved, "key", content[:length])
    assert damaged(saved, "key", content + b"x")


def test_no_flipped_bit_is_believed(saved: Checkpoints) -> None:
    saved.save("key", {"weights": torch.tensor([1.0, 2.0]), "seed": 3})
    content = (saved.folder / "key.state").read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        assert damaged(saved, "key", bytes(changed)), bit


def test_files_that_changed_places_are_not_believed(saved: Checkpoints) -> None:
    saved.save("5-hidden-0", torch.ones(2))
    saved.save("6-hidden-0", torch.zeros(2))
    assert damaged(saved, "5-hidden-0", (saved.folder / "6-hidden-0.state").read_bytes())


# The folder of a run.


def begun(output: Path, identity: dict[str, Any], restart: bool = False) -> RunFolder:
    run = RunFolder(output, Silent()).__enter__()
    try:
        run.begin(identity, restart)
        run.check_rows({"calibration": "abc"})
    except BaseException as error:
        run.__exit__(type(error), error, None)
        raise
    return run


def cut_short(output: Path, error: BaseException, key: str | None = "work") -> list[str]:
    """Begin, save something, and leave with an error; its notes."""
    run = begun(output, {"seed": 0, "torch": "1"})
    if key:
        run.saved.save(key, 1)
    run.__exit__(type(error), error, None)
    return list(getattr(error, "__notes__", ()))


def test_a_second_run_into_the_same_output_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out", Silent()):
        with pytest.raises(UsageError, match=rf"another run into .*out is under way \(process {os.getpid()}\)"):
            RunFolder(tmp_path / "out", Silent()).__enter__()
        with RunFolder(tmp_path / "other", Silent()):
            pass
    assert list(tmp_path.iterdir()) == []
    with RunFolder(tmp_path / "out", Silent()):
        pass


def test_a_signal_at_any_line_of_the_beginning_leaves_no_folder(tmp_path: Path) -> None:
    class Arrived(BaseException):
        pass

    def interrupted(at: int) -> bool:
        """Whether the beginning, which an exception cuts short at its at-th line, had that many."""
        lines = 0

        def trace(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            if lines == at:
                sys.settrace(None)
                raise Arrived
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            run.__enter__()
        except Arrived:
            return True
        finally:
            sys.settrace(previous)
        return False

    for at in range(1, 10_000):
        run = RunFolder(tmp_path / "out", Silent())
        if not interrupted(at):
            break
        assert list(tmp_path.iterdir()) == [], at
    assert at > 20
    run.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ResourceError("full"), InputLostError("gone"), RuntimeError("bug")]
)
def test_finished_work_is_kept_and_gone_on_with(tmp_path: Path, error: BaseException) -> None:
    notes = cut_short(tmp_path / "out", error)
    assert len(notes) == 1 and "the same command goes on" in notes[0]
    run = begun(tmp_path / "out", {"seed": 0, "torch": "1"})
    assert run.saved.load("work") == 1 and run.starts == 2
    run.finish()
    run.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (KeyboardInterrupt(), None),
        (UsageError("no"), "work"),
        (NumericalError("NaN"), "work"),
        (InputError("bad"), "work"),
    ],
)
def test_what_cannot_be_gone_on_with_is_removed(tmp_path: Path, error: BaseException, key: str | None) -> None:
    assert cut_short(tmp_path / "out", error, key) == []
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused_with_both_values_and_its_work_stays(tmp_path: Path) -> None:
    cut_short(tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(UsageError) as caught:
        begun(tmp_path / "out", {"seed": 7, "torch": "1"})
    assert "seed was 0, is 7" in str(caught.value) and "torch" not in str(caught.value)
    run = begun(tmp_path / "out", {"seed": 0, "torch": "1"})
    with pytest.raises(UsageError, match="calibration rows was abc, is def"):
        run.check_rows({"calibration": "def"})
    run.__exit__(None, None, None)


def test_without_resume_the_unfinished_run_is_reported_and_removed(tmp_path: Path) -> None:
    cut_short(tmp_path / "out", KeyboardInterrupt())

    class Listening(Silent):
        said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    with RunFolder(tmp_path / "out", Listening()) as run:
        run.begin({"seed": 0}, True)
        assert run.saved.load("work") is None
    assert len(Listening.said) == 1 and "was removed" in Listening.said[0]


def test_a_replaced_output_comes_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "old").mkdir(parents=True)
    with pytest.raises(ResourceError), RunFolder(output, Silent()) as run:
        run.begin({}, False)
        run.ship(run.plans / "missing")
    assert (output / "old").is_dir()
    # Killed between the two renames: the next run finds the old output in the folder.
    left = tmp_path / ".out.hawqtool"
    left.mkdir()
    output.rename(left / "replaced")
    with RunFolder(output, Silent()):
        assert (output / "old").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("key", ["identity", "rows", "starts"])
def test_a_damaged_record_of_the_run_costs_no_work(tmp_path: Path, key: str) -> None:
    cut_short(tmp_path / "out", KeyboardInterrupt())
    path = tmp_path / ".out.hawqtool" / "saved" / f"{key}.state"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with RunFolder(tmp_path / "out", Silent()) as again:
        again.begin({"seed": 0, "torch": "1"}, False)
        again.check_rows({"calibration": "abc"})
        assert again.saved.load("work") is not None and again.starts == 2
