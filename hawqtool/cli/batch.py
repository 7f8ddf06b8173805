"""``hawqtool batch``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session


def batch(
    file: Annotated[Path, typer.Argument(metavar="JOBS", help="YAML file with defaults, matrix and jobs.")],
    output: Annotated[
        Optional[str],
        typer.Option("--output", "-o", help="Folder of the batch \\[default: as in JOBS].", metavar="DIR"),
    ] = None,
    measurements: Annotated[
        Optional[str],
        typer.Option(
            "--measurements",
            help="Folder of measurements that jobs share \\[default: measurements in the folder of the batch].",
            metavar="DIR",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", "-j", min=1, help="Jobs at a time, each on a GPU of its own; on a CPU they share its cores."
        ),
    ] = 1,
    launcher: Annotated[
        Optional[str],
        typer.Option(
            "--launcher",
            help='Command that starts each job on a machine of a cluster, such as "srun --gpus 1 --".',
            metavar="PREFIX",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other settings, and damaged ones.")
    ] = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Quantize many models, targets and methods; a failed job does not stop the others, a rerun does what is missing.

    The exit code is 3 if any gate failed, else the largest of the jobs. A result counts as there when its report.json
    has the fingerprint of the job's settings and inputs, and its files are as they were written.

    Example: hawqtool batch jobs.yaml --dry-run

    Example: hawqtool batch jobs.yaml -o runs --jobs 4

    Example: hawqtool batch jobs.yaml -o /shared/runs --jobs 8 --launcher "srun --gpus 1 --"
    """
    code = 0
    with session(quiet, debug, json) as terminal:
        from hawqtool.pipeline.batch.jobs_file import read_batch

        found = read_batch(file, output, measurements, overwrite)

        from hawqtool.cli.render_batch import dry_run_table, summary_table
        from hawqtool.pipeline.batch import runner as work
        from hawqtool.pipeline.batch.launcher import Launcher
        from hawqtool.pipeline.batch.processes import device_slots
        from hawqtool.pipeline.batch.summary import batch_code

        launched = None if launcher is None else Launcher.of(launcher)
        if dry_run:
            decide_hub_access(source for job in found.jobs for source in job.config.data_sources)
            rows = work.dry_run(found, terminal)
            terminal.end()
            code = batch_code(rows)
            if json:
                print_json({"schema": "hawqtool.batch-dryrun/1", "jobs": rows})
            else:
                dry_run_table(rows)
        else:
            # What a launcher starts gets its devices from that.
            slots = [None] * jobs if launched else device_slots(jobs, os.environ, _cuda_devices)
            summary = work.run_batch(found, slots, terminal, launched)
            terminal.end()
            code = summary["exit_code"]
            if json:
                print_json(summary)
            else:
                summary_table(summary, found.folder)
    if code:
        raise SystemExit(code)


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()
