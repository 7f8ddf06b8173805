"""``hawqtool quantize``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawqtool.cli import options as o
from hawqtool.cli.render import announcement, print_report
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.data.sources import public_name


def quantize(
    model: o.Model = None,
    output: o.Output = None,
    target_bpw: o.TargetBpw = None,
    target_size: o.TargetSize = None,
    target_kl: o.TargetKl = None,
    plan: o.Plan = None,
    costs: o.Costs = None,
    max_cost: o.MaxCost = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    profile: o.Profile = None,
    pin: o.Pin = None,
    ignore: o.Ignore = None,
    quantize_lm_head: o.QuantizeLmHead = None,
    calibration: o.Calibration = None,
    num_samples: o.NumSamples = None,
    seq_len: o.SeqLen = None,
    eval_data: o.EvalData = None,
    eval_samples: o.EvalSamples = None,
    sensitivity: o.Sensitivity = None,
    shortlist: o.Shortlist = None,
    exchanges: o.Exchanges = None,
    extra_metrics: o.ExtraMetrics = None,
    probes: o.Probes = None,
    eigenvalues: o.Eigenvalues = None,
    solver: o.Solver = None,
    rounding: o.Rounding = None,
    foem_beta: o.FoemBeta = None,
    damping: o.Damping = None,
    scale_sign: o.ScaleSign = None,
    device: o.Device = None,
    rows_per_slice: o.RowsPerSlice = None,
    max_memory: o.MaxMemory = None,
    seed: o.Seed = None,
    trust_remote_code: o.TrustRemoteCode = None,
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
        decide_hub_access(settings.data_sources)
        settings.require_one_target()

        from hawqtool.pipeline.dryrun import describe
        from hawqtool.pipeline.job import prepare
        from hawqtool.pipeline.quantize import run_quantize

        def announce(description: dict[str, Any]) -> None:
            for line in announcement(description):
                terminal.say(line)

        if dry_run:
            description = describe(prepare(settings, terminal))
            if json:
                print_json({"schema": "hawqtool.dryrun/1", **description})
            else:
                print("\n".join(announcement(description)))
            return
        report = run_quantize(settings, shlex.join(["hawqtool", *shortened(sys.argv[1:])]), terminal, announce)
        terminal.close()
        if json:
            print_json(report)
        else:
            print_report(report, str(settings.output))
        _check_gates(report)


def _check_gates(report: dict[str, Any]) -> None:
    """Raise a QualityError that names the first failed gate; the output is in place by now."""
    from hawqtool.errors import QualityError

    for gate in report["gates"]:
        if not gate["passed"]:
            raise QualityError(
                f"{gate['gate']} {gate['bound']:g} was not met: the best that was found measures {gate['value']:.4g} "
                f"at {report['sizes']['bpw_linears']:.3f} bits per weight, and was written; raise the bound, add wider "
                "--bits, use a smaller --group-size or more calibration rows"
            )


_NOT_CONFIG = {"config", "dry_run", "json", "quiet", "debug"}


_DATA_FLAGS = ("--calibration", "--eval-data")


def shortened(arguments: Sequence[str]) -> list[str]:
    """Arguments without the folders of paths, which say where a machine keeps its files."""
    return [_short(argument, previous) for previous, argument in zip(("", *arguments), arguments, strict=False)]


def _short(argument: str, previous: str) -> str:
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={_short(value, flag)}"
    if "/" not in argument or argument.startswith("re:"):
        return argument
    if previous in _DATA_FLAGS:
        from hawqtool.config import split_weight

        name = split_weight(argument)[0]
        return public_name(name) + argument.removeprefix(name)
    return Path(argument).name
