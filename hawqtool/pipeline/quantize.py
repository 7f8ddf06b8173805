"""The main job: measure, allocate, round, write, evaluate, verify, report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hawqtool.allocation.uniform import UniformCandidate, neighbours
from hawqtool.config import RunConfig
from hawqtool.errors import NumericalError, UsageError
from hawqtool.evaluation.divergence import interpolate_log, paired_difference
from hawqtool.export.verify import verify_folder
from hawqtool.export.writer import copy_small_files
from hawqtool.formats import QuantFormat
from hawqtool.model.index import fingerprint
from hawqtool.pipeline.artifacts import (
    REPORT_SCHEMA,
    SENSITIVITY_SCHEMA,
    metric_scores,
    read_json,
    read_sensitivity,
    write_json,
)
from hawqtool.pipeline.costs import meets_second_budget
from hawqtool.pipeline.dryrun import describe
from hawqtool.pipeline.evaluating import Evaluator, as_record
from hawqtool.pipeline.job import Job, prepare
from hawqtool.pipeline.measuring import job_menu, measure_job, unquantized_bytes
from hawqtool.pipeline.planning import (
    allocate,
    budget_bytes,
    given_plan,
    plan_warnings,
    single_choice_plan,
    stored_bytes,
)
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.report_page import NEEDS_MATPLOTLIB, matplotlib_installed, write_page
from hawqtool.pipeline.reporting import build_report, is_our_folder, write_card, write_reproduce
from hawqtool.pipeline.rounding import round_to_folder
from hawqtool.pipeline.rows import gather_rows
from hawqtool.records import SCORE_METRICS, BitPlan, Evaluation, Rows, Score


@dataclass
class Candidate:
    """A plan that was rounded, written and evaluated."""

    plan: BitPlan
    folder: Path
    rounding: dict[str, Any]
    quality: dict[str, Evaluation] = field(default_factory=dict)


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
    timings: dict[str, float] = {}
    job = prepare(config, reporter)
    description = describe(job)
    announce(description)
    work = output.with_name(f".{output.name}.hawqtool-{os.getpid()}")
    try:
        with _timed(timings, "rows"):
            sets = gather_rows(job, reporter)
        with _timed(timings, "measure"):
            plan, sensitivity = _decide(job, sets, reporter)
        for text in plan_warnings(plan):
            reporter.warn(text)
        candidates = _round_all(job, plan, sets, work, reporter, timings)
        with _timed(timings, "evaluate"):
            original = _evaluate_all(job, candidates, sets, reporter)
        shipped = _choose(job, candidates)
        evaluation = _evaluation(candidates, original)
        report = build_report(
            job, sets, candidates[shipped].plan, candidates[shipped].rounding, evaluation, shipped, timings, command
        )
        folder = candidates[shipped].folder
        with _timed(timings, "verify"):
            _complete(job, folder, sensitivity, report)
        write_json(folder / "report.json", report)
        if matplotlib_installed():
            write_page(folder)
        else:
            reporter.say(f"report.html was not drawn: it {NEEDS_MATPLOTLIB}")
        _put_in_place(folder, output)
        return report
    finally:
        shutil.rmtree(work, ignore_errors=True)


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


class _timed:
    """Adds the seconds of a block of code to a stage."""

    def __init__(self, timings: dict[str, float], stage: str) -> None:
        self.timings, self.stage = timings, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.timings[self.stage] = self.timings.get(self.stage, 0.0) + time.perf_counter() - self.start


def _decide(job: Job, sets: dict[str, Rows], reporter: Reporter) -> tuple[BitPlan, dict[str, Any] | None]:
    """The plan, and the sensitivity document if something was measured."""
    config = job.config
    if config.plan is not None:
        return given_plan(config, job.units), None
    menu = job_menu(job, None)
    budget = budget_bytes(config, job.units, unquantized_bytes(job, menu))
    menu = job_menu(job, budget)
    fixed = single_choice_plan(job.units, menu, job.pins, budget, config)
    if fixed is not None:
        return fixed, None
    metric = config.metric(job.task.per_row)
    if config.sensitivity in ("auto", *SCORE_METRICS):
        document = measure_job(job, menu, sets, reporter)
        scores = {
            unit: {label: Score(v, e or 0.0) for label, (v, e) in by_label.items()}
            for unit, by_label in document["scores"][metric].items()
        }
        return allocate(job.units, menu, scores, job.pins, budget, metric, config), document
    saved = Path(config.sensitivity)
    table, _, _ = read_sensitivity(saved)
    if table.model_fingerprint != fingerprint(job.index):
        raise UsageError(f"{config.sensitivity} was measured on another checkpoint ({table.model}); measure this one")
    if table.rounding != config.rounding:
        raise UsageError(
            f"{config.sensitivity} was measured for --rounding {table.rounding}, not {config.rounding}; measure again"
        )
    if table.symmetric != config.symmetric:
        kind, flag = ("symmetric", "--symmetric") if table.symmetric else ("asymmetric", "--asymmetric")
        raise UsageError(f"{config.sensitivity} was measured for {kind} grids; give {flag} or measure again")
    scores = metric_scores(table, metric, saved)
    plan = allocate(job.units, menu, scores, job.pins, budget, metric, config)
    return plan, read_json(saved, SENSITIVITY_SCHEMA)


def _round_all(
    job: Job, plan: BitPlan, sets: dict[str, Rows], work: Path, reporter: Reporter, timings: dict[str, float]
) -> dict[str, Candidate]:
    """Round the plan, the best uniform plan of its kind that fits, and the uniform neighbour to interpolate with."""
    wanted = {"mixed": plan}
    budget = max(plan.budget_bytes or 0, plan.stored_bytes)
    below, above = neighbours(job.units, plan.stored_bytes, plan.symmetric)
    best, _ = neighbours(job.units, budget, plan.symmetric)
    for name, candidate in (("uniform", best), ("below", below), ("above", above)):
        if candidate is None:
            continue
        exact = below is not None and below.stored_bytes == plan.stored_bytes
        if name == "above" and exact:
            continue
        wanted[name] = _as_plan(job, candidate)
    candidates: dict[str, Candidate] = {}
    rounded: dict[tuple[QuantFormat, ...], Candidate] = {}
    for name, item in wanted.items():
        key = tuple(item.formats[unit.name] for unit in job.units)
        if key not in rounded:
            with _timed(timings, f"round_{name}"):
                result = round_to_folder(job, item, sets["calibration"], work / name, reporter, name)
            rounded[key] = Candidate(item, work / name, result)
        candidates[name] = rounded[key]
    return candidates


def _as_plan(job: Job, candidate: UniformCandidate) -> BitPlan:
    weights = sum(unit.num_weights for unit in job.units)
    return BitPlan(candidate.formats, stored_bytes(job.units, candidate.formats), weights)


def _evaluate_all(job: Job, candidates: dict[str, Candidate], sets: dict[str, Rows], reporter: Reporter) -> Evaluation:
    evaluator = Evaluator(job, {role: sets[role] for role in ("selection", "report")}, reporter)
    for name, candidate in candidates.items():
        if not candidate.quality:
            candidate.quality = evaluator.evaluate(candidate.folder, name)
    return evaluator.evaluate(None, "original")["report"]


def _choose(job: Job, candidates: dict[str, Candidate]) -> str:
    """Uniform is shipped unless the mixed plan is better on the selection rows; a plan file is shipped as given."""
    if job.config.plan is not None or "uniform" not in candidates:
        return "mixed"
    mixed, uniform = candidates["mixed"], candidates["uniform"]
    if mixed is uniform:
        return "uniform"
    if not _obeys(job, uniform.plan):
        return "mixed"
    return "mixed" if mixed.quality["selection"].divergence < uniform.quality["selection"].divergence else "uniform"


def _obeys(job: Job, plan: BitPlan) -> bool:
    """Whether a plan respects pins and second budget, and the widths, group size and profile that were asked for."""
    config = job.config
    if any(plan.formats[unit].bits != fmt.bits for unit, fmt in job.pins.items()):
        return False
    if not meets_second_budget(config, job.units, plan.formats):
        return False
    menu = job_menu(job, None)
    fixed_widths = config.bits is not None or config.profile == "portable"
    for unit, fmt in plan.formats.items():
        if fixed_widths and fmt.bits not in {f.bits for f in menu[unit]}:
            return False
        if "group_size" in config.model_fields_set and fmt.group_size != menu[unit][0].group_size:
            return False
    return True


def _evaluation(candidates: dict[str, Candidate], original: Evaluation) -> dict[str, Any]:
    mixed = candidates["mixed"]
    measure = original.measure
    result: dict[str, Any] = {
        "measure": measure,
        "original": as_record(original),
        "mixed": _record(mixed),
        "uniform": None,
    }
    points = {c.plan.stored_bytes: c.quality["report"].divergence for n, c in candidates.items() if n != "mixed"}
    value = interpolate_log(sorted(points.items()), mixed.plan.stored_bytes)
    interpolated = None if value is None else {measure: value, "stored_bytes": mixed.plan.stored_bytes}
    result["uniform_interpolated"] = interpolated
    result["neighbours"] = {name: _record(candidates[name]) for name in ("below", "above") if name in candidates}
    if "uniform" in candidates:
        uniform = candidates["uniform"]
        difference, stderr = paired_difference(mixed.quality["report"], uniform.quality["report"])
        selected, selected_stderr = paired_difference(mixed.quality["selection"], uniform.quality["selection"])
        result["uniform"] = _record(uniform)
        result["mixed_minus_uniform"] = {measure: difference, f"{measure}_stderr": stderr}
        result["selection"] = {"mixed_minus_uniform": selected, "stderr": selected_stderr}
    return result


def _record(candidate: Candidate) -> dict[str, Any]:
    labels = sorted({fmt.label for fmt in candidate.plan.formats.values()})
    return as_record(candidate.quality["report"]) | {
        "formats": labels,
        "stored_bytes": candidate.plan.stored_bytes,
        "bpw_linears": candidate.plan.bpw,
        "total_bytes": candidate.rounding["total_bytes"],
        "rounding_seconds": candidate.rounding["seconds"],
    }


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
