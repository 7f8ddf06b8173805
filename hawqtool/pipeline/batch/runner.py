"""The ``batch`` command: every job as a process of its own, what is there already left alone."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from hawqtool.errors import HawqError, UsageError, one_line
from hawqtool.export.manifest import first_damage
from hawqtool.pipeline.batch.jobs_file import JOBS, Batch, BatchJob, measured_settings
from hawqtool.pipeline.batch.launcher import Launcher
from hawqtool.pipeline.batch.processes import Outcome, Program, run_programs
from hawqtool.pipeline.batch.summary import GATE_FAILED, Row, empty_row, result, summarize, write_summary
from hawqtool.pipeline.run.files import REPORT_SCHEMA, write_text
from hawqtool.pipeline.run.fingerprint import config_fingerprint
from hawqtool.report import escape
from hawqtool.report.schema import Report
from hawqtool.report.wording import MEASURES, duration
from hawqtool.runtime.reporter import Reporter

OUT_OF_MEMORY, CRASHED = 5, 1
_DOCUMENTED = (0, 1, 2, 3, 4, 5, 130, 143)
_LOOKED_AT = 4096
"""Bytes at the end of a log in which its last line is looked for."""
_LONGEST_ERROR = 400

TO_DO, DONE, CHANGED, DAMAGED = "to do", "done", "other settings", "damaged"
"""Whether a job's folder holds its result."""


@dataclass(frozen=True)
class JobState:
    """What a job's folder holds.

    Args:
        name: One of the four states.
        report: The result's, where the job is done.
        obstacle: Why the job cannot run without ``--overwrite``, where that is so.
    """

    name: str
    report: Report | None = None
    obstacle: str | None = None


def job_state(job: BatchJob, reporter: Reporter) -> JobState:
    """Whether a job is done: its result has the fingerprint of its settings and inputs, and all files as they were.

    A folder that is not ours is left for the job to refuse.
    """
    folder = Path(str(job.config.output))
    report = _report(folder / "report.json")
    if report is None:
        return JobState(TO_DO)
    progress = partial(reporter.progress, "fingerprint of a model")
    state, held = CHANGED, "the result of other settings or inputs"
    if report.get("config_fingerprint") == config_fingerprint(job.config, progress=progress):
        problem = first_damage(folder)
        if problem is None:
            return JobState(DONE, report)
        state, held = DAMAGED, f"a damaged result ({problem})"
    if job.config.overwrite:
        return JobState(TO_DO)
    return JobState(state, obstacle=f"{job.config.output} holds {held}; --overwrite replaces it")


def _report(path: Path) -> Report | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast(Report, found) if isinstance(found, dict) and found.get("schema") == REPORT_SCHEMA else None


def check_batch(batch: Batch) -> None:
    """Check before the work that the folder of the batch can be made.

    Raises:
        UsageError: If it is a file, or its parent is missing.
    """
    if batch.folder.exists() and not batch.folder.is_dir():
        raise UsageError(f"--output {batch.folder} is a file, a folder was expected; choose another name")
    if not batch.folder.absolute().parent.is_dir():
        raise UsageError(f"the parent folder of {batch.folder} does not exist; create it first")


def run_batch(
    batch: Batch, slots: Sequence[str | None], reporter: Reporter, launcher: Launcher | None = None
) -> dict[str, Any]:
    """``hawqtool batch``: run what is missing, then write the summary; also when this is interrupted.

    Args:
        batch: The jobs.
        slots: Devices, see `hawqtool.pipeline.batch.processes.device_slots`.
        reporter: One line per job.
        launcher: Starts each job; None for processes of this machine.

    Returns:
        The summary (``hawqtool.batch/1``).
    """
    check_batch(batch)
    run = _BatchRun(batch, reporter, launcher)
    try:
        run_programs(run.prepare(), slots, run.ended, run.working)
    finally:
        summary = run.write()
    return summary


class _BatchRun:
    """Rows of a batch as its jobs end."""

    def __init__(self, batch: Batch, reporter: Reporter, launcher: Launcher | None) -> None:
        self.batch, self.reporter, self.launcher = batch, reporter, launcher
        self.start, self.count, self.measured = time.monotonic(), 0, 0
        self.rows = {job.name: empty_row(job) for job in batch.jobs}
        self.logs = batch.folder / JOBS
        self.said: dict[str, str] = {}

    def prepare(self) -> list[Program]:
        """Settle what needs no run; the programs of the rest."""
        self.logs.mkdir(parents=True, exist_ok=True)
        programs = []
        for job in self.batch.jobs:
            state = job_state(job, self.reporter)
            if state.report is not None:
                self._settle(job.name, result(state.report), "already there")
            elif state.obstacle is not None:
                failed = {"status": "failed", "exit_code": UsageError.exit_code, "error": state.obstacle}
                self._settle(job.name, failed, "")
            else:
                file, settings = self.logs / f"{job.name}.yaml", job.yaml()
                # A job that was cut short goes on by itself; one whose settings changed since then starts anew.
                changed = file.is_file() and file.read_text(encoding="utf-8") != settings
                write_text(file, settings)
                command: tuple[str, ...] = (sys.executable, "-m", "hawqtool", "quantize", "-c", str(file), "--json")
                command += ("--restart",) if changed else ()
                command = self.launcher.command(command) if self.launcher else command
                kind = repr(measured_settings(job.config))
                programs.append(Program(job.name, command, self.logs / f"{job.name}.log", kind))
        return programs

    def working(self, program: Program, seconds: float) -> None:
        """Say where a job is: the last line that it said, where it is a new one."""
        said = _last_line(program.log)
        if said and said != self.said.get(program.name):
            self.said[program.name] = said
            self.reporter.say(f"{program.name}, {duration(seconds)}: {said}")

    def ended(self, program: Program, outcome: Outcome) -> None:
        """Record how a job ended."""
        try:
            report = json.loads(outcome.stdout) if outcome.code in (0, GATE_FAILED) else None
        except ValueError:
            report = None
        row: Row = {"ran": True, "seconds": outcome.seconds, "device": outcome.device}
        if report is not None and report.get("schema") == REPORT_SCHEMA:
            row |= result(report)
            self.measured += row["measurement"] == "run"
        else:
            code, said = _failure(outcome.code, program.log)
            row |= {"status": "failed", "exit_code": code, "error": said}
        self._settle(program.name, row, f"{outcome.seconds:.0f} s")

    def _settle(self, name: str, row: Row, how: str) -> None:
        self.rows[name] |= row
        self.count += 1
        self.reporter.say(f"[{self.count}/{len(self.rows)}] {name}: {_line(self.rows[name], how)}")

    def write(self) -> dict[str, Any]:
        """Write and return the summary."""
        summary = summarize(list(self.rows.values()), time.monotonic() - self.start, self.measured)
        write_summary(self.batch.folder, summary)
        return summary


def _last_line(log: Path) -> str:
    """The last line of a log that has anything on it; empty where there is none."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _LOOKED_AT))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    return escape.one_line(next((line for line in reversed(lines) if line.strip()), ""), _LONGEST_ERROR)


def _failure(code: int, log: Path) -> tuple[int, str]:
    """Documented exit code and reason of a job that has no report."""
    if code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            return OUT_OF_MEMORY, f"was killed ({name}), which a machine out of memory does; lower --jobs or its rows"
        return CRASHED, f"crashed ({name}); see {log}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    if code in (0, GATE_FAILED):  # srun ends with 0 where a node fails
        why = next((f" ({line[:_LONGEST_ERROR]})" for line in reversed(lines) if "error: " in line), "")
        return CRASHED, f"ended with {code} but printed no report{why}; see {log}"
    return (code if code in _DOCUMENTED else CRASHED), said.removeprefix("error: ")[:_LONGEST_ERROR] or f"see {log}"


def _line(row: Row, how: str) -> str:
    if row["status"] == "failed":
        return f"failed with code {row['exit_code']}" + (f" in {how}" if how else "") + f": {row['error']}"
    found = f"{row['bpw_linears']:.3f} bits, {MEASURES[row['measure']]} "
    found += "not finite" if row["divergence"] is None else f"{row['divergence']:.4g}"
    shared = {"shared": ", shared measurement", "run": ", measured"}.get(row["measurement"], "") * row["ran"]
    gate = "" if row["exit_code"] == 0 else f", GATE FAILED ({row['error']})"
    return f"{row['status'] if row['exit_code'] == 0 else 'done'}, {how}, {found}{shared}{gate}"


def dry_run(batch: Batch, reporter: Reporter) -> list[Row]:
    """What each job would do, from headers alone; writes nothing."""
    from hawqtool.pipeline.dry_run import describe
    from hawqtool.pipeline.run.job import prepare

    check_batch(batch)
    rows = []
    for number, job in enumerate(batch.jobs, 1):
        row = empty_row(job)
        try:
            state = job_state(job, reporter)
            row |= {"status": state.name, "exit_code": 0}
            if state.obstacle is not None:
                row |= {"exit_code": UsageError.exit_code, "error": state.obstacle}
            found = describe(prepare(job.config, reporter))
            row |= {"original_bytes": found["original_bytes"], "quantized_bytes": found["expected_bytes"]}
            row["bpw_linears"] = found["budget_bpw"]
        except HawqError as error:
            row |= {"status": "would fail", "exit_code": error.exit_code, "error": one_line(error)}
        reporter.progress("dry run", number, len(batch.jobs))
        rows.append(row)
    return rows
