"""Runs programs as processes of their own, several at a time, each on a device of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hawqtool.errors import UsageError
from hawqtool.runtime.lifeline import Lifeline

VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.05
_TELL_SECONDS = 10.0
_GRACE_SECONDS = 15.0
"""Time of a terminated program to clean up; it can be gone on with in any case."""


@dataclass(frozen=True)
class Program:
    """A program to run.

    Args:
        name: Names it to the caller.
        command: With its arguments.
        log: File that takes its stderr.
        kind: Programs of one kind wait for each other's work, so others are started first where there are any.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    kind: object


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        code: Its exit code, negative where a signal ended it.
        stdout: What it printed.
        seconds: Its time.
        device: Value of CUDA_VISIBLE_DEVICES that it was given; None where it has the caller's.
    """

    code: int
    stdout: str
    seconds: float
    device: str | None


@dataclass
class _Running:
    program: Program
    process: subprocess.Popen[bytes]
    stdout: IO[bytes]
    start: float


def device_slots(count: int, environment: Mapping[str, str], installed: Callable[[], int]) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES each of ``count`` processes gets: one device each, where there are several processes.

    Args:
        count: Processes at a time; a single one keeps all devices.
        environment: Devices that it restricts the program to are shared out.
        installed: Number of CUDA devices of the machine, asked where the environment does not say.

    Raises:
        UsageError: If there are devices, but fewer than processes.
    """
    if count == 1:
        return [None]
    named = environment.get(VISIBLE)
    # CUDA ignores what follows an invalid number.
    devices = [d.strip() for d in named.split(",")] if named is not None else [str(d) for d in range(installed())]
    devices = [d for d in devices if d and d != "-1"]
    if not devices:
        return [None] * count
    if count > len(devices):
        raise UsageError(
            f"--jobs {count} needs as many CUDA devices, found {len(devices)} ({', '.join(devices)}); lower it"
        )
    return list(devices[:count])


def run_programs(
    programs: Sequence[Program],
    slots: Sequence[str | None],
    ended: Callable[[Program, Outcome], None],
    working: Callable[[Program, float], None] = lambda _program, _seconds: None,
) -> None:
    """Run all programs, one at a time per slot; they are terminated when this is interrupted, and when it is killed.

    Args:
        programs: In the order in which they are to start.
        slots: See `device_slots`.
        ended: Called as each ends.
        working: Called now and then with each that runs, and its seconds.
    """
    told = time.monotonic()
    waiting, running = list(programs), dict[int, _Running]()
    with Lifeline() as line:
        try:
            while waiting or running:
                for slot in range(len(slots)):
                    if waiting and slot not in running:
                        program = _next(waiting, [entry.program.kind for entry in running.values()])
                        waiting.remove(program)
                        running[slot] = _start(program, slots[slot], line)
                for slot, entry in list(running.items()):
                    code = entry.process.poll()
                    if code is not None:
                        del running[slot]
                        ended(entry.program, _outcome(entry, code, slots[slot]))
                if time.monotonic() - told >= _TELL_SECONDS:
                    told = time.monotonic()
                    for entry in running.values():
                        working(entry.program, told - entry.start)
                time.sleep(_POLL_SECONDS)
        finally:
            _stop([entry.process for entry in running.values()])


def _next(waiting: list[Program], kinds: list[object]) -> Program:
    return next((program for program in waiting if program.kind not in kinds), waiting[0])


def _start(program: Program, device: str | None, line: Lifeline) -> _Running:
    # A pipe that nobody reads would block the program; `_outcome` closes the file.
    stdout = tempfile.TemporaryFile()  # noqa: SIM115
    environment = os.environ | line.environment | ({} if device is None else {VISIBLE: device})
    with program.log.open("wb") as log:
        # Ctrl-C reaches this process alone, which then terminates the programs and waits for their cleaning up.
        process = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,
            env=environment,
            pass_fds=(line.descriptor,),
            process_group=0,
        )
    return _Running(program, process, stdout, time.monotonic())


def _outcome(entry: _Running, code: int, device: str | None) -> Outcome:
    with entry.stdout as stream:
        stream.seek(0)
        text = stream.read().decode("utf-8", errors="replace")
    return Outcome(code, text, time.monotonic() - entry.start, device)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
