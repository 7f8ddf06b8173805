"""The main job: measure, allocate, round, write, evaluate, verify, report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hawqtool.config import RunConfig
from hawqtool.errors import NumericalError, UsageError
from hawqtool.export.verify import verify_folder
from hawqtool.export.writer import copy_small_files
from hawqtool.pipeline.artifacts import REPORT_SCHEMA, write_json
from hawqtool.pipeline.candidates import Stopwatch, Workbench
from hawqtool.pipeline.contest import choose, compare, hold
from hawqtool.pipeline.deciding import Allocator, prepare_allocation
from hawqtool.pipeline.dryrun import describe
from hawqtool.pipeline.fingerprints import config_fingerprint
from hawqtool.pipeline.gating import judge_gates, matching_baseline
from hawqtool.pipeline.job import Job, prepare
from hawqtool.pipeline.measurements import check_measurements
from hawqtool.pipeline.measuring import job_menu, unquantized_bytes
from hawqtool.pipeline.planning import budget_bytes, given_plan, plan_warnings
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.report_page import NEEDS_MATPLOTLIB, matplotlib_installed, write_page
from hawqtool.pipeline.reporting import build_report, is_our_folder, write_card, write_reproduce
from hawqtool.pipeline.rows import gather_rows
from hawqtool.pipeline.targeting import find_smallest
from hawqtool.records import BitPlan


def run_quantize(
    config: RunConfig, command: str, reporter: Reporter, announce: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """``hawqtool quantize``: from a checkpoint to a verified quantized folder.

    Args:
        config: The run's configuration, with exactly one target.
        command: The command line, for the report.
        reporter: Narration and progress.
        announce: Called with what will happen, before the long part.

    Returns:
        The report (`hawqtool.report/1`).

    Raises:
        HawqError: Nothing is left behind then.
    """
    config.require_one_target()
    output = _check_output(config)
    check_measurements(config)
    identity = config_fingerprint(config)  # of the files as the run begins
    timings: dict[str, float] = {}
    job = prepare(config, reporter)
    description = describe(job)
    announce(description)
    work = output.with_name(f".{output.name}.hawqtool-{os.getpid()}")
    try:
        with Stopwatch(timings, "rows"):
            sets = gather_rows(job, reporter)
        baseline = matching_baseline(config, sets["report"])
        with Stopwatch(timings, "measure"):
            allocator = None if config.plan else prepare_allocation(job, sets, reporter)
        bench = Workbench(job, sets, work, reporter, timings)
        search, plans = _plans(bench, allocator)
        contest = hold(bench, plans)
        shipped = choose(job, contest)
        evaluation = compare(contest, bench.original(), allocator.predicted if allocator else lambda _: {})
        winner = contest.mixed[contest.best] if shipped == "mixed" else contest.uniform["uniform"]
        report = build_report(job, sets, winner.plan, winner.rounding, evaluation, shipped, timings, command)
        report |= {"search": search, "gates": judge_gates(config, winner, report, baseline)}
        origin = asdict(allocator.origin) if allocator and allocator.origin else None
        report |= {"config_fingerprint": identity, "measurement": origin}
        if allocator and allocator.table:
            report["warnings"] += allocator.table.warnings
        with Stopwatch(timings, "verify"):
            _complete(job, winner.folder, allocator.document if allocator else None, report)
        write_json(winner.folder / "report.json", report)
        if matplotlib_installed():
            write_page(winner.folder)
        else:
            reporter.say(f"report.html was not drawn: it {NEEDS_MATPLOTLIB}")
        _put_in_place(winner.folder, output)
        return report
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _plans(bench: Workbench, allocator: Allocator | None) -> tuple[dict[str, Any] | None, dict[str, BitPlan]]:
    """The search for a quality target, if there was one, and the plans to try by name."""
    job = bench.job
    if allocator is None:
        return None, {"plan": given_plan(job.config, job.units)}
    if job.config.target_kl is not None:
        return find_smallest(bench, allocator, job.config.target_kl)
    budget = budget_bytes(job.config, job.units, unquantized_bytes(job, job_menu(job, None)))
    plans = allocator.shortlist(budget)
    for text in (text for plan in plans.values() for text in plan_warnings(plan)):
        bench.reporter.warn(text)
    return None, plans


def _check_output(config: RunConfig) -> Path:
    if config.output is None:
        raise UsageError("--output is needed: the folder to create")
    output = Path(config.output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not config.overwrite:
            raise UsageError(f"{config.output} exists and is not empty; choose another folder or give --overwrite")
        if not is_our_folder(output):
            raise UsageError(
                f"{config.output} has no report.json of schema {REPORT_SCHEMA}, so it was not made by hawqtool and "
                "--overwrite leaves it alone; choose another folder"
            )
    if not output.parent.is_dir():
        raise UsageError(f"the parent folder of {config.output} does not exist; create it first")
    return output


def _complete(job: Job, folder: Path, sensitivity: dict[str, Any] | None, report: dict[str, Any]) -> None:
    """Add the small files, the card and the records, then reopen and verify what was written."""
    copy_small_files(job.index.folder, folder)
    write_card(job.index.folder, folder, report)
    write_reproduce(job, folder, sensitivity)
    problems = verify_folder(folder, job.index.folder).problems
    if problems:
        raise NumericalError(f"the written folder failed verification: {problems[0]} ({len(problems)} problems)")


def _put_in_place(folder: Path, output: Path) -> None:
    """Rename the complete folder to the output; a folder that it replaces comes back if that fails."""
    if not output.exists():
        folder.rename(output)
        return
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    output.rename(old)
    try:
        folder.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old)
