"""``hawqtool quantize``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from hawqtool.cli import options as o
from hawqtool.cli.render import announcement, print_report
from hawqtool.cli.session import print_json, session


def quantize(
    model: o.Model = None,
    output: o.Output = None,
    target_bpw: o.TargetBpw = None,
    target_size: o.TargetSize = None,
    plan: o.Plan = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    profile: o.Profile = None,
    pin: o.Pin = None,
    ignore: o.Ignore = None,
    calibration: o.Calibration = None,
    num_samples: o.NumSamples = None,
    seq_len: o.SeqLen = None,
    eval_data: o.EvalData = None,
    eval_samples: o.EvalSamples = None,
    sensitivity: o.Sensitivity = None,
    rounding: o.Rounding = None,
    foem_beta: o.FoemBeta = None,
    damping: o.Damping = None,
    scale_sign: o.ScaleSign = None,
    device: o.Device = None,
    rows_per_slice: o.RowsPerSlice = None,
    seed: o.Seed = None,
    overwrite: o.Overwrite = None,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Do everything: a checkpoint in, a verified quantized checkpoint and its report out.

    Example: hawqtool quantize ./model -o ./out --target-bpw 3.5

    Example: hawqtool quantize ./model -o ./out --bits 4 --target-bpw 4.25 --group-size 64 --calibration text.txt
    """
    values: dict[str, Any] = {k: v for k, v in locals().items() if k not in _NOT_CONFIG}
    with session(quiet, debug) as terminal:
        from hawqtool.config import load_config

        settings = load_config(config, values)
        settings.require_one_target()

        from hawqtool.pipeline.dryrun import describe
        from hawqtool.pipeline.job import prepare
        from hawqtool.pipeline.quantize import run_quantize

        def announce(description: dict[str, Any]) -> None:
            for line in announcement(description):
                terminal.say(line)

        if dry_run:
            description = describe(prepare(settings))
            if json:
                print_json({"schema": "hawqtool.dryrun/1", **description})
            else:
                print("\n".join(announcement(description)))
            return
        report = run_quantize(settings, shlex.join(["hawqtool", *map(_short, sys.argv[1:])]), terminal, announce)
        terminal.close()
        if json:
            print_json(report)
        else:
            print_report(report, str(settings.output))


_NOT_CONFIG = {"config", "dry_run", "json", "quiet", "debug"}


def _short(argument: str) -> str:
    """An argument without the folders of a path, which say where a machine keeps its files."""
    return Path(argument).name if "/" in argument and not argument.startswith("re:") else argument
