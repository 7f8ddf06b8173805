"""``hawqtool quantize``."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from hawqtool.checkpoint.source import require_model
from hawqtool.cli import options as o
from hawqtool.cli.junit import recorded_run
from hawqtool.cli.ranks import assist, start_ranks
from hawqtool.cli.render import announcement, fitted, print_report
from hawqtool.cli.session import decide_hub_access, print_json, session
from hawqtool.cli.terminal import Terminal
from hawqtool.config import SETTINGS, RunConfig, load_config
from hawqtool.data.sources import public_name
from hawqtool.errors import QualityError, UsageError
from hawqtool.parsing import printable
from hawqtool.report.documents import DryRun
from hawqtool.report.schema import Gate, Report
from hawqtool.report.wording import gate_found
from hawqtool.runtime.imports.head_start import head_start
from hawqtool.runtime.launched import rank, world_size
from hawqtool.settings.metadata import flag_of
from hawqtool.values import split_weight


@o.with_settings
def quantize(
    values: o.Values,
    preset: o.Preset = None,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    junit: o.Junit = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Do everything: a checkpoint in, a verified quantized checkpoint and its report out.

    Example: hawqtool quantize ./model -o ./out --target-bpw 3.5

    Example: hawqtool quantize ./model -o ./out --preset fast

    Example: hawqtool quantize ./model -o ./out --bits 4 --target-bpw 4.25 --group-size 64 --calibration text.txt

    Example: hawqtool quantize ./model -o out.gguf --to gguf --template model-bf16.gguf --target-bpw 4
    """
    if not dry_run:
        start_ranks(config, values, preset)
        if rank():
            assist(config, values, preset, debug)
            return
    with session(quiet, debug, json, verbose) as terminal, recorded_run(junit, terminal) as record:
        settings = load_config(config, values, preset)
        record.model = settings.model
        decide_hub_access(settings.data_sources)
        if settings.to == "gguf":
            _quantize_to_gguf(settings, terminal, dry_run, json)
            return
        settings.require_one_target()
        if world_size() == 1:
            require_model(settings.model)  # said at once: the imports below take seconds

        with _without_collections(stays=dry_run):
            head_start(settings.device)
            from hawqtool.pipeline.dry_run import dry_run as described
            from hawqtool.pipeline.quantize import run_quantize

        def announce(description: DryRun) -> None:
            if "estimate" in description:
                terminal.expect(description["estimate"]["phases"])
            for line in announcement(description):
                for part in fitted(line, terminal.console).splitlines():
                    terminal.say(part)

        if dry_run:
            description = described(settings, terminal)
            if json:
                print_json({"schema": "hawqtool.dryrun/1", **description})
            else:
                console = Console()
                print("\n".join(fitted(printable(line), console) for line in announcement(description)))
            return
        command = shlex.join(["hawqtool", *shortened(sys.argv[1:])])
        report = run_quantize(settings, command, terminal, announce, estimates=not quiet)
        record.gates = report["gates"]
        terminal.end()
        terminal.answered = True
        if json:
            print_json(report)
        else:
            print_report(report, str(settings.output), terminal.seconds)
        _check_gates(report, terminal)


@contextmanager
def _without_collections(stays: bool) -> Iterator[None]:
    """Let imports go on without collections of garbage, which made them a fifth longer, and none look at them later.

    Args:
        stays: Whether nothing is collected afterwards either, as in a dry run, most of whose time goes to imports.
    """
    gc.disable()
    try:
        yield
    finally:
        if not stays:
            gc.freeze()  # a walk through all that was imported takes a third of a second
            gc.enable()


def _quantize_to_gguf(settings: RunConfig, terminal: Terminal, dry_run: bool, json: bool) -> None:
    """One file for llama.cpp; its record is what is printed."""
    if dry_run:
        raise UsageError("--dry-run describes folders; a run with --to gguf says exact sizes before its work")
    if world_size() > 1:
        raise UsageError(f"--to gguf works in one process, found {world_size()}; start it without torchrun or srun")
    from hawqtool.cli.render_gguf import print_gguf
    from hawqtool.pipeline.gguf.conversion import run_gguf

    document = run_gguf(settings, terminal)
    terminal.close()
    terminal.answered = True
    if json:
        print_json(document)
    else:
        print_gguf(document, str(settings.output), settings.model)
    search = document["search"]
    if search is not None and not search["met"]:
        best = min(trial["divergence"]["selection"] for trial in search["trials"])
        raise QualityError(
            f"no file meets --target-kl {search['bound']:g}: the best that was tried has {best:.4g} on the selection "
            "rows. It was written; raise the target or add larger --block-types"
        )


def _check_gates(report: Report, terminal: Terminal) -> None:
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


def _advice(gates: list[Gate]) -> str:
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


_DATA_FLAGS = tuple(flag_of(name) for name, setting in SETTINGS.items() if setting.names == "source")


def shortened(arguments: Sequence[str]) -> list[str]:
    """Arguments without the folders of paths, which say where a machine keeps its files."""
    return [_short(argument, previous) for previous, argument in zip(("", *arguments), arguments, strict=False)]


def _short(argument: str, previous: str) -> str:
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={_short(value, flag)}"
    if "/" not in argument or argument.startswith("re:") or previous == "--base-model":
        return argument
    if previous in _DATA_FLAGS:
        name = split_weight(argument)[0]
        return public_name(name) + argument.removeprefix(name)
    return Path(argument).name
