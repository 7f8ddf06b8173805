"""``hawqtool measure``: scores of every unit and format, in sensitivity.json."""

from __future__ import annotations

from pathlib import Path

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import check_writable, write_json
from hawqtool.pipeline.run.folder import RunFolder
from hawqtool.pipeline.run.identity import check_unchanged, record_content, run_identity, stamps
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.menu import WIDE_MENU, format_menu
from hawqtool.pipeline.stages.evaluate import check_rotation
from hawqtool.pipeline.stages.measure import measured
from hawqtool.pipeline.stages.measurement_cache import check_measurements
from hawqtool.pipeline.stages.rows import check_calibration, gather_rows
from hawqtool.pipeline.worker import begin_ranks, leading
from hawqtool.records import SCORE_METRICS, SWEEP_METRICS
from hawqtool.report.documents import SensitivityDocument
from hawqtool.runtime.reporter import Reporter


def run_measure(config: RunConfig, output: Path, reporter: Reporter) -> SensitivityDocument:
    """``hawqtool measure``: write sensitivity.json for the widths asked for (default 2,3,4,8).

    A metric of the common sweeps that the configuration names is measured alone.

    Raises:
        UsageError: If it names a saved file instead of a metric.
        HawqError: With a note where finished work is kept (see `RunFolder`).
    """
    if config.sensitivity not in ("auto", *SCORE_METRICS):
        raise UsageError(f"measure makes scores anew; --sensitivity names a metric there, found {config.sensitivity}")
    check_writable(output)
    check_measurements(config)
    with RunFolder(output.absolute(), reporter) as run, leading(config) as others:
        job = prepare(config, reporter, states=run.path)
        check_calibration(job)
        before = stamps(job.index)
        record_content(job.index, before, reporter)
        run.begin(run_identity(job), config.restart)
        menu = format_menu(job.units, config.given_widths or WIDE_MENU, config)
        context = RunContext(job, reporter, run.saved, begin_ranks(others, job))
        sets = gather_rows(context, scores_alone=True)
        run.check_rows({name: rows.fingerprint for name, rows in sets.items()})
        check_rotation(context, sets)
        alone = config.sensitivity in SWEEP_METRICS
        document, _ = measured(context, menu, sets, (config.sensitivity,) if alone else SWEEP_METRICS)
        check_unchanged(job.index, before)
        write_json(output, document)
        run.finish()
    return document
