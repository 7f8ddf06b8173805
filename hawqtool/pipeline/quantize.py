"""The main job: measure, allocate, round, write, evaluate, verify, report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from hawqtool.allocation.exact import plan_warnings
from hawqtool.config import RunConfig
from hawqtool.errors import InputError, NumericalError, UsageError, disk_errors
from hawqtool.export.engines import TRANSFORMERS
from hawqtool.export.manifest import seal
from hawqtool.pipeline.dry_run import check_free, describe, output_folder
from hawqtool.pipeline.load_trial.checks import ShippedChecks
from hawqtool.pipeline.load_trial.trial import LoadTrial, TrialProcess, started_ahead, trial_rows
from hawqtool.pipeline.report import FiguresAhead, write_page
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import read_report
from hawqtool.pipeline.run.fingerprint import config_fingerprint
from hawqtool.pipeline.run.folder import RunFolder
from hawqtool.pipeline.run.identity import check_unchanged, content_beside, record_content, run_identity, stamps
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.run.menu import budget_bytes, job_menu, unquantized_bytes
from hawqtool.pipeline.run.out_of_memory import (
    MOST_HALVINGS,
    halving_batch_size,
    remember_batch_size,
    resumed_batch_size,
)
from hawqtool.pipeline.search.estimate import estimate
from hawqtool.pipeline.search.gates import judge_gates, matching_baseline
from hawqtool.pipeline.search.good_size import good_size
from hawqtool.pipeline.search.planner import Planner, given_plan, make_planner
from hawqtool.pipeline.search.quality_target import find_smallest
from hawqtool.pipeline.search.selection import choose, compare, try_plans
from hawqtool.pipeline.search.trials import Trial, TrialRunner
from hawqtool.pipeline.stages.evaluate import check_rotation
from hawqtool.pipeline.stages.kv_cache import calibrate_cache
from hawqtool.pipeline.stages.measurement_cache import check_measurements
from hawqtool.pipeline.stages.report import Outcome, build_report, write_card, write_reproduce
from hawqtool.pipeline.stages.rows import gather_rows, load_ahead, read_ahead
from hawqtool.pipeline.stages.sampled_rows import as_sampled
from hawqtool.pipeline.stages.token_importance import compile_kernels, with_token_importance
from hawqtool.pipeline.tasks import check_tasks, judge_tasks
from hawqtool.pipeline.worker import begin_ranks, leading
from hawqtool.records import BitPlan, Rows
from hawqtool.report.documents import DryRun, SensitivityDocument
from hawqtool.report.page.drawing_processes import DrawingProcesses
from hawqtool.report.plan_comparison import Shipped, shipped_of
from hawqtool.report.schema import Engine, Report, Search, Verdict
from hawqtool.report.verdict import verdict
from hawqtool.runtime.reporter import Reporter
from hawqtool.runtime.stage_timer import Stopwatch, Timings

_CHECKING, _CHECKS = "checking the result", 4


def run_quantize(
    config: RunConfig, command: str, reporter: Reporter, announce: Callable[[DryRun], None], estimates: bool = False
) -> Report:
    """``hawqtool quantize``: from a checkpoint to a verified quantized folder.

    Args:
        config: The run's configuration, with exactly one target.
        command: The command line, for the report.
        reporter: Narration and progress.
        announce: Called with what will happen, before the long part.
        estimates: Whether it is told what the run may take, which takes a moment to find out.

    Returns:
        The report (`hawqtool.report/2`).

    Raises:
        HawqError: With a note where finished work is kept (see `RunFolder`); else nothing is left behind.
    """
    if config.to == "gguf":
        raise UsageError("GGUF files are written by hawqtool quantize on the command line alone; drop --to gguf here")
    config.require_one_target()
    output = output_folder(config)
    with RunFolder(output, reporter) as run, leading(config) as others, ExitStack() as stack:
        resuming = run.unfinished and not config.restart
        if not (resuming and run.in_place):
            check_free(config, output)
        check_measurements(config)
        job = prepare(config, reporter, states=run.path)
        job, warnings = resumed_batch_size(job, run) if resuming else (job, list[str]())
        before = stamps(job.index)
        process, drawing = stack.enter_context(started_ahead(job)), stack.enter_context(DrawingProcesses())
        read_ahead(job)
        with content_beside(job, before) as begun:
            check_tasks(job)
            description = describe(job)
            announce({**description, "estimate": estimate(job)} if estimates else description)
            load_ahead(job, resuming)  # behind the estimate, whose rates it would take for those of a slower machine
            compile_kernels(job)
            record_content(job.index, before, reporter, begun)
        fingerprint = config_fingerprint(config, job.index.content)
        run.begin(run_identity(job), config.restart)
        remember_batch_size(job, warnings, run)
        if run.in_place:
            run.finish()
            return read_report(output / "report.json")
        ranks = begin_ranks(others, job)

        def work(job: Job, warnings: list[str]) -> Report:
            context = RunContext(job, reporter, run.saved, ranks)
            folder, report = _quantized(context, run, command, warnings, fingerprint, process, drawing)
            context.background.finish()
            check_unchanged(job.index, before)
            run.ship(folder)
            return report

        try:
            return halving_batch_size(job, warnings, run, reporter, work, most=MOST_HALVINGS if ranks.size == 1 else 0)
        except (NumericalError, InputError):
            check_unchanged(job.index, before)  # which would explain it
            raise


def _quantized(
    context: RunContext,
    run: RunFolder,
    command: str,
    warnings: list[str],
    fingerprint: str,
    process: TrialProcess | None,
    drawing: DrawingProcesses,
) -> tuple[Path, Report]:
    """The complete and verified folder inside the run's, and its report."""
    timings = Timings(context.saved)
    context, sets = _with_rows(context, timings)
    job = context.job
    baseline = matching_baseline(job.config, sets["report"]) if "report" in sets else None
    run.check_rows({name: rows.fingerprint for name, rows in sets.items()})
    with Stopwatch(timings, "rotation"):
        rotation = check_rotation(context, sets)
    with Stopwatch(timings, "KV cache"):
        cache = calibrate_cache(context, sets)
    if job.settings.uses_token_importance:
        with Stopwatch(timings, "token importance"):
            sets["calibration"] = with_token_importance(context, sets["calibration"], for_feedback=True)
    with Stopwatch(timings, "measure"):
        planner = None if job.config.plan else make_planner(context, sets)
    done = {"rotation": rotation, "KV cache": cache, "measure": planner and planner.table}
    for stage in (stage for stage, result in done.items() if result is None):
        del timings[stage]  # there was nothing to do
    if job.device.type == "cuda":
        drawing.start()
    checks, figures = ShippedChecks(job, trial_rows(job, sets), process), FiguresAhead(drawing)
    runner = TrialRunner(context, sets, run.plans, timings, checks)
    search, plans = _plans(runner, planner)
    winner, outcome = _outcome(runner, plans, planner)
    folder = runner.folder(winner)
    report = build_report(job, sets, outcome, timings, command)
    if job.config.tasks:
        with Stopwatch(timings, "tasks"):
            report["tasks"] = judge_tasks(context, folder)
    report |= {"search": search, "gates": judge_gates(job.config, winner, report, baseline), "starts": run.starts}
    report["verdict"] = _verdict(report, winner.plan, planner)
    origin = planner.origin.record if planner and planner.origin else None
    report |= {"config_fingerprint": fingerprint, "measurement": origin}
    report["rotation_choice"] = job.rotation
    if rotation is not None:
        report["rotation"] = rotation
    if cache is not None:
        report["kv_cache"] = cache
    report["warnings"] += warnings
    if planner and planner.table:
        report["warnings"] += planner.table.warnings
    with Stopwatch(timings, "verify"), disk_errors(folder):
        context.progress(_CHECKING)(0, _CHECKS)
        checks.begin(folder, winner.plan)
        _complete(context, folder, planner.document if planner else None, report, checks, figures)
    figures.begin(folder, report)  # now with the seconds of verification
    report = seal(folder, report, checks.hashes())
    with disk_errors(folder):
        write_page(folder, figures.finish())
    context.progress(_CHECKING)(_CHECKS, _CHECKS)
    return folder, report


def _with_rows(context: RunContext, timings: Timings) -> tuple[RunContext, dict[str, Rows]]:
    """The run's rows, and the run as they came about."""
    with Stopwatch(timings, "rows"):
        sets = gather_rows(context)
    if "calibration" in sets:
        context = replace(context, job=as_sampled(context.job, sets["calibration"]))
    return context, sets


def _outcome(runner: TrialRunner, plans: dict[str, BitPlan], planner: Planner | None) -> tuple[Trial, Outcome]:
    """The plan that is shipped, and how it compares; without an evaluation the first one as it is."""
    job = runner.context.job
    if not job.config.evaluates:
        name, plan = next(iter(plans.items()))
        trial = runner.run_trial(name, plan)
        kind: Shipped = "uniform" if len({fmt.bits for fmt in plan.formats.values()}) == 1 else "mixed"
        return trial, Outcome(plan, trial.rounding, None, kind)
    selection = try_plans(runner, plans, planner.scores if planner else {})
    shipped = choose(job, selection)
    evaluation = compare(selection, runner.original(), planner.predicted if planner else lambda _: {})
    winner = selection.mixed[selection.best] if shipped == "mixed" else selection.uniform
    assert winner is not None  # otherwise no uniform plan were shipped
    return winner, Outcome(winner.plan, winner.rounding, evaluation, shipped)


def _verdict(report: Report, plan: BitPlan, planner: Planner | None) -> Verdict | None:
    """What the figures of the shipped plan mean, and what size would be better."""
    evaluation, rows = report["evaluation"], report["rows"]["report"]
    if evaluation is None or rows is None:
        return None
    quality = shipped_of(evaluation, report["shipped"])
    found = verdict(evaluation["original"], quality, rows["count"])
    return found | {"good": good_size(planner, plan, quality[evaluation["measure"]], found)}


def _plans(runner: TrialRunner, planner: Planner | None) -> tuple[Search | None, dict[str, BitPlan]]:
    """The search for a quality target, if there was one, and the plans to try by name."""
    job = runner.context.job
    if planner is None:
        return None, {"plan": given_plan(job.config, job.units)}
    if job.config.target_kl is not None:
        return find_smallest(runner, planner, job.config.target_kl)
    budget = budget_bytes(job.config, job.units, unquantized_bytes(job, job_menu(job, None)), job.pins)
    plans = planner.shortlist(budget)
    for text in (text for plan in plans.values() for text in plan_warnings(plan)):
        runner.context.reporter.warn(text)
    return None, plans


def _complete(
    context: RunContext,
    folder: Path,
    sensitivity: SensitivityDocument | None,
    report: Report,
    checks: ShippedChecks,
    figures: FiguresAhead,
) -> None:
    """Add card and records, and wait for what tries and verifies the folder before it is sealed."""
    job, tell = context.job, context.progress(_CHECKING)
    tell(1, _CHECKS)
    write_reproduce(job, folder, sensitivity)
    figures.begin(folder, report)
    problems = checks.problems()
    if problems:
        raise NumericalError(f"the written folder failed verification: {problems[0]} ({len(problems)} problems)")
    tell(2, _CHECKS)
    trial = checks.trial()
    if trial is not None:
        _take_claims(trial, report)
    write_card(job.index.folder, folder, report)
    tell(3, _CHECKS)


def _transformers(report: Report) -> Engine:
    return next(entry for entry in report["engines"] if entry["engine"] == TRANSFORMERS)


def _take_claims(trial: LoadTrial, report: Report) -> None:
    """Replace the verdict on transformers by what a trial gave."""
    _transformers(report).update({"loads": trial.loads, "reason": trial.reason, "tried": trial.loads is not None})
    if trial.loads is False:
        report["warnings"].append(f"transformers does not load this folder as it should: {trial.reason}")
