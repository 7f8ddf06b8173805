"""``hawqtool quantize``."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawqtool.cli import options as o
from hawqtool.cli.junit import recorded_run
from hawqtool.cli.render import announcement, print_report
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.cli.terminal import Terminal
from hawqtool.data.sources import public_name
from hawqtool.errors import QualityError
from hawqtool.parsing import printable
from hawqtool.report.wording import gate_found


def quantize(
    model: o.Model = None,
    output: o.Output = None,
    target_bpw: o.TargetBpw = None,
    target_size: o.TargetSize = None,
    target_kl: o.TargetKl = None,
    plan: o.Plan = None,
    costs: o.Costs = None,
    max_cost: o.MaxCost = None,
    max_kl: o.MaxKl = None,
    max_ppl_increase: o.MaxPplIncrease = None,
    min_same_top: o.MinSameTop = None,
    max_size: o.MaxSize = None,
    max_fallbacks: o.MaxFallbacks = None,
    baseline: o.Baseline = None,
    max_regression: o.MaxRegression = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    extra_group_sizes: o.ExtraGroupSizes = None,
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
    measurements: o.Measurements = None,
    shortlist: o.Shortlist = None,
    swaps: o.Swaps = None,
    extra_metrics: o.ExtraMetrics = None,
    probes: o.Probes = None,
    eigenvalues: o.Eigenvalues = None,
    solver: o.Solver = None,
    rounding: o.Rounding = None,
    foem_beta: o.FoemBeta = None,
    gptaq_alpha: o.GptaqAlpha = None,
    target_shift: o.TargetShift = None,
    scale_refit: o.ScaleRefit = None,
    token_importance: o.TokenImportance = None,
    damping: o.Damping = None,
    refine_steps: o.RefineSteps = None,
    sensitivity_steps: o.SensitivitySteps = None,
    distill_steps: o.DistillSteps = None,
    distill_codes: o.DistillCodes = None,
    scale_sign: o.ScaleSign = None,
    device: o.Device = None,
    batch_size: o.BatchSize = None,
    max_memory: o.MaxMemory = None,
    seed: o.Seed = None,
    trust_remote_code: o.TrustRemoteCode = None,
    overwrite: o.Overwrite = None,
    resume: o.Resume = None,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    junit: o.Junit = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Do everything: a checkpoint in, a verified quantized checkpoint and its report out.

    Example: hawqtool quantize ./model -o ./out --target-bpw 3.5

    Example: hawqtool quantize ./model -o ./out --bits 4 --target-bpw 4.25 --group-size 64 --calibration text.txt
    """
    values: dict[str, Any] = {k: v for k, v in locals().items() if k not in _NOT_CONFIG}
    if dry_run:
        gc.disable()  # nearly all of its time goes to imports, which collections only make longer
    with session(quiet, debug, json) as terminal, recorded_run(junit, terminal) as record:
        from hawqtool.config import load_config

        settings = load_config(config, values)
        record.model = settings.model
        decide_hub_access(settings.data_sources)
        settings.require_one_target()

        from hawqtool.pipeline.dry_run import describe
        from hawqtool.pipeline.quantize import run_quantize
        from hawqtool.pipeline.run.job import prepare

        def announce(description: dict[str, Any]) -> None:
            for line in announcement(description):
                terminal.say(line)

        if dry_run:
            description = describe(prepare(settings, terminal))
            if json:
                print_json({"schema": "hawqtool.dryrun/1", **description})
            else:
                print("\n".join(map(printable, announcement(description))))
            return
        report = run_quantize(settings, shlex.join(["hawqtool", *shortened(sys.argv[1:])]), terminal, announce)
        record.gates = report["gates"]
        terminal.close()
        terminal.answered = True
        if json:
            print_json(report)
        else:
            print_report(report, str(settings.output))
        _check_gates(report, terminal)


def _check_gates(report: dict[str, Any], terminal: Terminal) -> None:
    """Say that all gates passed, or raise a QualityError with those that did not; the output is in place by now."""
    gates = report["gates"]
    failed = tuple(gate_found(gate) for gate in gates if not gate["passed"])
    if failed:
        raise QualityError(
            f"{len(failed)} of {len(gates)} gates failed: {'; '.join(failed)}. The output was written, at "
            f"{report['sizes']['bpw_linears']:.3f} bits per weight; {_advice(gates)}",
            failed,
        )
    if gates:
        terminal.say(f"gates       {len(gates)} of {len(gates)} passed: {'; '.join(map(gate_found, gates))}")


def _advice(gates: list[dict[str, Any]]) -> str:
    """What to change, by what failed: sizes and quality pull at opposite ends."""
    failed = {gate["name"] for gate in gates if not gate["passed"]}
    advice = []
    if failed & {"max_size", "regression_size"}:
        advice.append("for a smaller file lower the target")
    if "max_fallbacks" in failed:
        advice.append("for fewer fallbacks use more calibration rows")
    if failed - {"max_size", "regression_size", "max_fallbacks"}:
        raised = "add wider --bits" if "target_kl" in failed else "raise the target"
        advice.append(f"for better quality {raised}, use a smaller --group-size or more calibration rows")
    return f"{', '.join(advice)}, or change the limit"


_NOT_CONFIG = {"config", "dry_run", "junit", "json", "quiet", "debug"}


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
        from hawqtool.values import split_weight

        name = split_weight(argument)[0]
        return public_name(name) + argument.removeprefix(name)
    return Path(argument).name
