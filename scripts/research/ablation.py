"""What each ingredient of rounding is worth: configurations on the same rows, rounded and evaluated in memory.

    python scripts/research/ablation.py MODEL OUT.json CONFIGURATIONS.yaml --calibration A.txt \
        --eval-data B.txt --bits 3

CONFIGURATIONS.yaml maps names to keys of a run that differ from the command line's, such as

    gptq: {}
    rtn: {rounding: rtn}
    refined: {refine_steps: 200}
    refined, slow scales: {refine_steps: 200, schedule: {scale_rate: 0.001}}
    distilled, slow: {distill_steps: 64, distill_schedule: {scale_rate: 0.0005}}
    codes: {distill_steps: 64, distill_codes: true}
    peer: {tool: "python run_peer.py {model} {rows} {out} --bits 3"}

`bits` there gives another uniform width, `plan` a plan.json, and `tool` the command of another tool (see
`study.tools.run_tool`), which is to quantize as --bits and --group-size say; `schedule` sets rates of the refinement
and `distill_schedule` those of the distillation (see `hawqtool.rounding.learned.block.Schedule` and
`hawqtool.rounding.learned.end_to_end.DistillSchedule`). Every configuration runs once per seed of --seeds, which draws
the calibration rows; the evaluation rows are always the same. OUT.json is written after each run, and a repeated call
does only what is missing. The table has KL with its standard error (over rows; over seeds where there are several),
the paired difference to the first configuration on the same seeds, perplexity, stored bits per weight, seconds of
rounding and peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import yaml
from torch import Tensor

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig, load_config
from hawqtool.errors import HawqError, UsageError
from hawqtool.evaluation.divergence import OutputComparison, standard_error
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import read_json, write_json
from hawqtool.pipeline.run.identity import model_fingerprint
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.search.planner import given_plan
from hawqtool.pipeline.stages.distill import DistilledModel, distill_model, schedule_of
from hawqtool.pipeline.stages.refine import weighted_blocks
from hawqtool.pipeline.stages.round_blocks import round_blocks
from hawqtool.pipeline.stages.rows import calibration_rows, evaluation_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.records import Evaluation, RoundedLayer, Rows, UnitFormats
from hawqtool.report.schema import Training
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.layer import quantized
from hawqtool.rounding.learned.block import Schedule
from hawqtool.rounding.learned.end_to_end import DistillSchedule
from hawqtool.runtime.malloc import configure_allocators
from hawqtool.runtime.reporter import Reporter
from hawqtool.streaming.stream import ModelStream
from sensitivity_study import Narrator
from study.cost import Meter
from study.plans import Overlay
from study.tools import run_tool

SCHEMA = "hawqtool.ablation/1"
_KEYS = (
    "model", "calibration", "eval_data", "num_samples", "seq_len", "eval_samples", "group_size", "batch_size",
    "device",
)  # fmt: skip
_SCHEDULES: dict[str, type] = {"schedule": Schedule, "distill_schedule": DistillSchedule}
_OTHERS = ("bits", "tool", *_SCHEDULES)
"""Keys of a configuration that are none of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    configure_allocators()  # as the command does
    options = _parse(arguments)
    try:
        print(table(run(options)), end="")
    except HawqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path, help="JSON file for the results")
    parser.add_argument("configurations", type=Path, help="YAML file: name to keys")
    parser.add_argument("--calibration", required=True, help="source of the calibration rows, or self")
    parser.add_argument("--eval-data", required=True, help="source of the evaluation rows")
    parser.add_argument("--bits", type=int, default=3, help="uniform width (default: 3)")
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--num-samples", type=int, help="calibration rows (default: 128, on a CPU 16)")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default: 2048, on a CPU 256)")
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


@dataclass
class Memory:
    """Takes what rounding changes and keeps it.

    Args:
        transposed: Linears that the checkpoint stores as ``[in, out]``.
        layers: Rounded layers by name, on the CPU.
        changed: Norm gains by the name of their tensor.
    """

    transposed: frozenset[str]
    layers: dict[str, Quantized] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)

    def write_layer(self, layer: RoundedLayer) -> None:
        """A rounded layer."""
        codes, scales, zeros, _ = quantized(layer)
        self.layers[layer.name] = Quantized(codes.cpu(), scales.cpu(), None if zeros is None else zeros.cpu())

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """A norm gain."""
        self.changed[name] = tensor.cpu()

    def distilled(self, found: DistilledModel) -> None:
        """Take layers and gains from distillation."""
        for name, layer in found.layers.items():
            self.layers[name] = self.layers[name]._replace(codes=layer.codes.cpu(), scales=layer.scales.cpu())
        self.changed |= {name: gain.cpu() for name, gain in found.gains.items()}

    def weights(self) -> dict[str, Tensor]:
        """Tensors that are not the original's, as the checkpoint has them, by name without ``.weight``."""
        dense = {name: dequantize(*layer) for name, layer in self.layers.items()}
        turned = {name: weight.t() if name in self.transposed else weight for name, weight in dense.items()}
        return turned | {name.removesuffix(".weight"): gain for name, gain in self.changed.items()}


class Bench:
    """Rounds and evaluates configurations; the original is run once, rows are drawn once per seed.

    Args:
        options: Command line.
        reporter: Progress.
    """

    def __init__(self, options: argparse.Namespace, reporter: Reporter) -> None:
        self.options, self.reporter = options, reporter
        self.base = {key: getattr(options, key) for key in _KEYS if getattr(options, key) is not None}
        self.job = self.prepare({}, options.seeds[0])
        self.rows = evaluation_rows(self.job, options.eval_data, self.job.settings.eval_samples)
        self.stream = self.job.unrotated().stream()  # as the command judges; storing a rotation costs something
        progress = self._progress("evaluating original")
        self.original = self.stream.final_hidden(self.rows.tokens, self.job.settings.batch_size, progress)
        self._calibration: dict[tuple[Any, ...], Rows] = {}

    def _progress(self, stage: str) -> Any:
        count = len(self.job.structure.blocks)
        return lambda index: self.reporter.progress(stage, index + 1, count)

    def prepare(self, overrides: Mapping[str, Any], seed: int) -> Job:
        """The model with a configuration.

        Raises:
            UsageError: If a key is unknown or a value does not fit.
        """
        keys = {key: value for key, value in overrides.items() if key not in _OTHERS}
        return prepare(load_config(None, self.base | keys | {"seed": seed}), self.reporter)

    def identity(self) -> dict[str, Any]:
        """What all results depend on; those of other settings may not stand beside them."""
        return {
            "model": self.job.source.name,
            "model_fingerprint": model_fingerprint(self.job.index, self.reporter),
            "device": self.job.device.type,
            "bits": self.options.bits,
            "group_size": self.job.config.base_group_size,
            "calibration": Path(self.options.calibration).name,
            "rows": [self.job.settings.num_samples, self.job.settings.seq_len],
            "batch_size": self.job.settings.batch_size,
            "evaluation_rows": self.rows.fingerprint,
        }

    def measure(self, name: str, overrides: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Round with a configuration and evaluate the result."""
        job = self.prepare(overrides, seed)
        formats = self._formats(job, overrides)
        if "tool" in overrides:
            return self._measure_tool(job, formats, name, overrides, seed)
        config = job.config
        given: dict[str, Any] = {"steps": config.refine_steps, "seed": seed, "learner": config.refine_learner}
        schedule = Schedule(**given | dict(overrides.get("schedule") or {}))
        memory = Memory(frozenset(n for n, linear in job.structure.linears.items() if linear.transposed))
        rows = self._rows(job)
        self.reporter.say(f"{name}, seed {seed}")
        with Meter(job.device) as meter:
            record = round_blocks(
                job, formats, rows, memory, partial(self.reporter.progress, f"rounding {name}"), schedule
            )
            rates = dict(overrides.get("distill_schedule") or {})
            distillation = self._distill(job, formats, memory, rows.tokens, name, rates)
        return {
            "name": name,
            "seed": seed,
            "overrides": dict(overrides),
            "bpw": 8 * stored_bytes(job.units, formats) / sum(unit.num_weights for unit in job.units),
            **meter.record,
            **_quality(self._evaluate(job, memory, name)),
            "refinement": record.refinement,
            "distillation": distillation,
            "betas": _betas(record.layers.values()) if job.settings.method.feedback_beta == "auto" else {},
        }

    def _measure_tool(
        self, job: Job, formats: UnitFormats, name: str, overrides: Mapping[str, Any], seed: int
    ) -> dict[str, Any]:
        """The same of what another tool makes of the same rows; its memory is not known."""
        self.reporter.say(f"{name}, seed {seed}")
        with tempfile.TemporaryDirectory() as scratch:
            source, seconds = run_tool(overrides["tool"], job.index.folder, self._rows(job).tokens, Path(scratch))
            quality = _quality(self._judge(job.stream(source), name))
        bpw = 8 * stored_bytes(job.units, formats) / sum(unit.num_weights for unit in job.units)
        found = {"name": name, "seed": seed, "overrides": dict(overrides), "bpw": bpw, "seconds": seconds}
        return found | {"peak_bytes": None, **quality, "refinement": {}, "distillation": {}, "betas": {}}

    def _distill(
        self,
        job: Job,
        formats: UnitFormats,
        memory: Memory,
        tokens: Tensor,
        name: str,
        rates: dict[str, Any],
    ) -> Training:
        schedule = replace(schedule_of(job.config), **rates)
        if not schedule.steps:
            return {}
        found = distill_model(
            RunContext(job, self.reporter), formats, memory.layers, memory.changed, tokens, name, schedule
        )
        memory.distilled(found)
        return found.record

    def _formats(self, job: Job, overrides: Mapping[str, Any]) -> UnitFormats:
        if job.config.plan is not None:
            return given_plan(job.config, job.units).formats
        bits = int(overrides.get("bits", self.options.bits))
        return uniform_formats(job.units, bits, job.config.base_group_size, job.config.symmetric)

    def _rows(self, job: Job) -> Rows:
        key = (
            job.config.calibration,
            job.settings.num_samples,
            job.settings.seq_len,
            job.config.seed,
            job.config.rotate,
            job.settings.uses_token_importance,
            (job.settings.output_feedback, job.config.learns, job.settings.method.needs_held_out)
            if job.feedback_layers
            else None,
            (weighted_blocks(job), job.config.learns) if weighted_blocks(job) else None,
        )
        if key not in self._calibration:
            found = calibration_rows(RunContext(job, self.reporter), {"calibration": job.settings.num_samples})
            self._calibration[key] = with_token_importance(RunContext(job, self.reporter), found["calibration"], True)
        return self._calibration[key]

    def _evaluate(self, job: Job, memory: Memory, name: str) -> Evaluation:
        return self._judge(job.stream(Overlay(TensorReader(job.index), memory.weights())), name)

    def _judge(self, stream: ModelStream, name: str) -> Evaluation:
        job = self.job
        with torch.no_grad():
            hidden = stream.final_hidden(
                self.rows.tokens, job.settings.batch_size, self._progress(f"evaluating {name}")
            )
            return OutputComparison(self.stream, stream, self.rows.tokens, self.original).evaluation(hidden)


def _betas(layers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many layers chose each of FOEM's β."""
    return {str(beta): count for beta, count in sorted(Counter(layer["beta"] for layer in layers).items())}


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "measure": evaluation.measure,
        "divergence": evaluation.divergence,
        "stderr": evaluation.stderr,
        "row_divergence": list(evaluation.row_divergence),
        "perplexity": evaluation.perplexity,
        "same_top": evaluation.same_top,
    }


def read_configurations(path: Path) -> dict[str, dict[str, Any]]:
    """Keys by name.

    Raises:
        UsageError: If the file is not of that form, or sets what is the same for all.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(keys, dict) for keys in found.values()) or not found:
        raise UsageError(f"{path} does not map names to keys; expected lines such as 'refined: {{refine_steps: 200}}'")
    known = set(RunConfig.model_fields) - {"model", "eval_data", "eval_samples", "seed", "device", "output"}
    for name, keys in found.items():
        unknown = sorted(set(keys) - known - set(_OTHERS))
        for key, kind in _SCHEDULES.items():
            unknown += sorted(set(keys.get(key) or {}) - {f.name for f in fields(kind) if f.name != "seed"})
        if unknown:
            others = " or ".join(_SCHEDULES)
            raise UsageError(f"{path}: {name} sets {unknown[0]}; expected keys of a run that may differ, or {others}")
    return {str(name): keys for name, keys in found.items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Results of all configurations that the file names, measured where they are missing.

    Raises:
        HawqError: For settings or inputs that do not fit.
    """
    wanted = read_configurations(options.configurations)
    reporter = Narrator()
    bench = Bench(options, reporter)
    for overrides in wanted.values():  # what is wrong with a later one shows before the first is run
        bench.prepare(overrides, options.seeds[0])
    document = {"schema": SCHEMA, "settings": json.loads(json.dumps(bench.identity())), "results": []}
    if options.out.exists():
        found = read_json(options.out, SCHEMA)
        other = [key for key, value in document["settings"].items() if found["settings"].get(key) != value]
        if other:
            raise UsageError(f"{options.out} holds results of other settings ({', '.join(other)}); name another file")
        document = found
    done = {(r["name"], r["seed"]): r["overrides"] for r in document["results"]}
    for name, overrides in wanted.items():
        for seed in options.seeds:
            if (name, seed) not in done:
                document["results"].append(bench.measure(name, overrides, seed))
                write_json(options.out, document)
            elif done[name, seed] != overrides:
                raise UsageError(f"{options.out} has {name} with other keys: {done[name, seed]}; rename one of the two")
    return document


def table(document: Mapping[str, Any]) -> str:
    """The results as a Markdown table, in the order in which they were first measured."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in document["results"]:
        by_name.setdefault(result["name"], []).append(result)
    first = {r["seed"]: r for r in next(iter(by_name.values()))}
    lines = [
        "| configuration | bits | KL | ± | minus first | ± | perplexity | seconds | peak GB | block error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in by_name.items():
        value, error = _mean([r["divergence"] for r in results], results[0]["stderr"])
        pairs = [
            torch.tensor(r["row_divergence"], dtype=torch.float64)
            - torch.tensor(first[r["seed"]]["row_divergence"], dtype=torch.float64)
            for r in results
            if r["seed"] in first
        ]
        gain = _mean([float(p.mean()) for p in pairs], standard_error(pairs[0])) if pairs else (math.nan, math.nan)
        words = [r["perplexity"] for r in results if r["perplexity"] is not None]
        perplexity = f"{sum(words) / len(words):.2f}" if words else ""
        seconds = sum(r["seconds"] for r in results) / len(results)
        peaks = [r["peak_bytes"] / 1e9 for r in results if r["peak_bytes"] is not None]
        cells = [name, f"{results[0]['bpw']:.3f}", f"{value:.4f}", f"{error:.4f}", f"{gain[0]:+.4f}", f"{gain[1]:.4f}"]
        cells += [
            perplexity,
            f"{seconds:.0f}",
            f"{max(peaks):.1f}" if peaks else "",
            _block_error(results[0]["refinement"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float], alone: float) -> tuple[float, float]:
    """Mean over seeds and its standard error; ``alone`` is the standard error where there is one seed."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), standard_error(found) if len(values) > 1 else alone


def _block_error(refinement: Mapping[str, Any]) -> str:
    """Mean relative held-out error of the blocks, before and after."""
    if not refinement:
        return ""
    before, after = (
        sum(b[key] for b in refinement.values()) / len(refinement) for key in ("error_before", "error_after")
    )
    return f"{before:.4f} to {after:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
