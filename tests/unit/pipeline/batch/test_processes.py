"""Processes of a batch: one per device, the rest waiting; none survives an interruption."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hawqtool.errors import UsageError
from hawqtool.pipeline.batch.processes import VISIBLE, Outcome, Program, device_slots, run_programs

REPORT = f"import os, time; start = time.time(); print(os.environ.get({VISIBLE!r}), start, time.time())"
MEETING = """
import os, pathlib, time
start = time.time()
here, other = map(pathlib.Path, {names!r})
here.touch()
while not other.exists():
    time.sleep(0.01)
print(os.environ.get({variable!r}), start, time.time())
"""
"""Ends only once the other one is under way."""


def program(folder: Path, name: str, code: str = REPORT, kind: object = None) -> Program:
    return Program(name, (sys.executable, "-c", code), folder / f"{name}.log", kind or name)


def meeting(folder: Path, name: str, other: str, kind: object = None) -> Program:
    names = [str(folder / f"{each}.here") for each in (name, other)]
    return program(folder, name, MEETING.format(names=names, variable=VISIBLE), kind)


def test_devices_are_shared_out() -> None:
    assert device_slots(1, {VISIBLE: "3,4"}, lambda: 8) == [None], "a single process keeps what it has"
    assert device_slots(2, {VISIBLE: "5, GPU-ab,7"}, lambda: 8) == ["5", "GPU-ab"]
    assert device_slots(3, {}, lambda: 4) == ["0", "1", "2"]
    assert device_slots(3, {}, lambda: 0) == device_slots(3, {VISIBLE: ""}, lambda: 8) == [None] * 3
    with pytest.raises(UsageError, match="--jobs 3 needs as many CUDA devices, found 2"):
        device_slots(3, {VISIBLE: "0,1"}, lambda: 8)


def test_each_device_has_one_process_at_a_time_and_all_are_used(tmp_path: Path) -> None:
    ended: dict[str, Outcome] = {}
    programs = [meeting(tmp_path, "p0", "p1"), meeting(tmp_path, "p1", "p0")]
    programs += [program(tmp_path, f"p{n}") for n in range(2, 6)]
    run_programs(programs, ["4", "7"], lambda p, outcome: ended.update({p.name: outcome}))
    assert len(ended) == 6
    spans: dict[str, list[tuple[float, float]]] = {}
    for outcome in ended.values():
        device, start, end = outcome.stdout.split()
        assert device == outcome.device and outcome.code == 0
        spans.setdefault(device, []).append((float(start), float(end)))
    assert sum(map(len, spans.values())) == 6 and spans.keys() == {"4", "7"}
    for found in spans.values():
        found.sort()
        assert all(first[1] <= second[0] for first, second in zip(found, found[1:], strict=False))


def test_those_that_would_wait_for_each_other_start_last(tmp_path: Path) -> None:
    started: dict[str, float] = {}
    # The first of each kind end together, so that neither waits for the other's second one.
    programs = [meeting(tmp_path, "a1", "b1", "a"), program(tmp_path, "a2", kind="a")]
    programs += [meeting(tmp_path, "b1", "a1", "b"), program(tmp_path, "b2", kind="b")]
    run_programs(programs, [None, None], lambda p, o: started.update({p.name: float(o.stdout.split()[1])}))
    assert max(started["a1"], started["b1"]) < min(started["a2"], started["b2"])


def test_failures_and_crashes_do_not_hurt_the_others(tmp_path: Path) -> None:
    codes: dict[str, int] = {}
    programs = [
        program(tmp_path, "exit", "import sys; print('said', file=sys.stderr); sys.exit(4)"),
        program(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
        program(tmp_path, "much", "print('x' * 3_000_000)"),
    ]
    run_programs(programs, [None], lambda p, outcome: codes.update({p.name: outcome.code}))
    assert codes == {"exit": 4, "killed": -signal.SIGKILL, "much": 0}
    assert (tmp_path / "exit.log").read_text() == "said\n"


def test_an_interruption_ends_the_running_ones(tmp_path: Path) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(900)"

    def interrupt(*_: object) -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_programs([program(tmp_path, "quick", "0"), program(tmp_path, "slow", code)], [None, None], interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
