"""What float formats and rounded inputs cost, predicted and measured; mixed plans beside uniform ones and a name rule.

    python scripts/research/study_float_formats.py MODEL OUT.jsonl --calibration A.txt --eval-data wiki=B.txt,code=C.txt

Every layer is rounded by itself on the original's inputs (no output feedback), once in every format; one walk then
serves all plans. A line of JSON each:

- every format everywhere: as an engine runs it, with its weights alone, and with its inputs alone;
- per menu the rule by names (attention in 8 bits, all else in 4), and the mixed plans at its bytes and at further
  budgets, with paired differences to the best uniform plan that fits and to the rule;
- with --single one unit in a format and all others as they are, and how prediction ranks them (Spearman): ``nvfp4``,
  or ``nvfp4-a4:inputs`` for these alone. In bfloat16 one unit in 8 bits moves the output less than its rounding does.

KL(original ‖ plan) in nats per token on each text, with its standard error over rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem, predicted_loss, stored_bytes
from hawqtool.config import RunConfig
from hawqtool.errors import HawqError
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.formats import UNQUANTIZED, QuantFormat, parse_label
from hawqtool.formats.activations import ActivationFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import parse_sensitivity
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.pipeline.stages.measure import measured
from hawqtool.pipeline.stages.rows import evaluation_rows, gather_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.records import Rows, SensitivityTable, UnitFormats
from hawqtool.rounding.floats.scale_search import divisor_of_peak
from hawqtool.rounding.grid import dequantize
from hawqtool.runtime.malloc import configure_allocators
from hawqtool.runtime.reporter import Silent
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.input_peaks import input_peaks
from hawqtool.streaming.input_statistics import group_statistics
from hawqtool.streaming.rounded_inputs import rounded_inputs

LABELS = "nvfp4,nvfp4-a4,fp8,fp8-a8f,w4g32,w8ch-a8i,mxfp4,mxfp4-a4,mxfp8-a8"
MENUS = (("nvfp4", "fp8-a8f"), ("nvfp4-a4", "fp8-a8f"), ("w4g32", "w8ch-a8i"))
"""Formats of a menu, the narrow one first; 16 bits are in each."""

_ATTENTION = re.compile(r"attn|attention")


@dataclass(frozen=True)
class Plan:
    """A plan to judge.

    Args:
        formats: Formats by unit.
        part: What of it is rounded: ``both``, ``weights`` or ``inputs``.
        about: What its line says beside.
        rivals: Names of plans that it is compared with, by what they are.
    """

    formats: UnitFormats
    part: str
    about: dict[str, Any]
    rivals: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, judge, write.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    configure_allocators()  # as the command does
    options = _parse(arguments)
    try:
        study = _Study.of(options)
        with options.out.open("w", encoding="utf-8") as out:
            for line in study.lines():
                out.write(json.dumps(line) + "\n")
    except HawqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path, help="file for the results")
    parser.add_argument("--calibration", required=True, help="source of the calibration and scoring rows")
    parser.add_argument("--eval-data", required=True, help="texts to judge on, NAME=SOURCE, comma-separated")
    parser.add_argument("--labels", default=LABELS, help="formats, comma-separated")
    parser.add_argument("--budgets", default="6,9", help="stored bits per weight beside those of the rule")
    parser.add_argument("--single", default="", help="formats of one unit at a time, LABEL or LABEL:PART")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration rows (default: 64)")
    parser.add_argument("--eval-samples", type=int, default=24, help="rows of each text (default: 24)")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--token-importance", default="auto", help="as `hawqtool quantize` has it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class _Study:
    """The model, its scores, and what it is judged on."""

    job: Job
    calibration: Rows
    table: SensitivityTable
    texts: dict[str, Tensor]
    labels: tuple[str, ...]
    budgets: tuple[float, ...]
    single: tuple[str, ...]

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Study:
        """Read the rows and measure the scores."""
        labels = tuple(options.labels.split(","))
        config = RunConfig(
            model=options.model, device=options.device, seq_len=options.seq_len, rotate="off", output_feedback="off",
            formats=(*labels, UNQUANTIZED), target_bpw=8.0, calibration=options.calibration, eval=False,
            num_samples=options.num_samples, rounding=options.rounding, batch_size=options.batch_size,
            token_importance=options.token_importance,
        )  # fmt: skip
        job = prepare(config, writes=False)
        context = RunContext(job, Silent())
        sets = gather_rows(context)
        sets["calibration"] = with_token_importance(context, sets["calibration"])
        named = (text.split("=", 1) for text in options.eval_data.split(","))
        texts = {name: evaluation_rows(job, source, options.eval_samples).tokens for name, source in named}
        table, _, _ = parse_sensitivity(measured(context, job_menu(job, None), sets)[0], "the measurement")
        budgets = tuple(map(float, options.budgets.split(",")))
        return cls(
            job, sets["calibration"], table, texts, labels, budgets, tuple(filter(None, options.single.split(",")))
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is said of each plan."""
        plans = dict(self.plans())
        rows = self.divergences(plans)
        for name, plan in plans.items():
            line = {"plan": name, "part": plan.part, **plan.about, "kl": self._by_text(rows[name])}
            yield line | {f"minus_{kind}": self._by_text(rows[name] - rows[r]) for kind, r in plan.rivals.items()}
        for wanted in self.single:
            yield self._ranks(wanted, {n: float(rows[n].mean()) for n in plans if n.startswith(f"single {wanted} ")})

    def _ranks(self, wanted: str, measured: dict[str, float]) -> dict[str, Any]:
        """How scores rank units by what one of them costs alone; ``trace`` is HAWQ-V2's form for inputs."""
        units = [name.split()[-1] for name in measured]
        label, _, part = wanted.partition(":")
        plans = [{unit: self._format(unit, label)} for unit in units]
        about = [self._about(plan, part or "both")["predicted"] for plan in plans]
        predictions = {metric: [each[metric] for each in about] for metric in self.table.scores}
        if part == "inputs":
            predictions = {"inputs": predictions[self.job.settings.metric]}
            predictions["trace"] = [self.table.curvature[unit]["input_fisher"] for unit in units]
        ranks = {metric: spearman(found, list(measured.values())) for metric, found in predictions.items()}
        return {"ranks": wanted, "units": len(units), "measured": sum(measured.values()), "spearman": ranks}

    def plans(self) -> Iterator[tuple[str, Plan]]:
        """Every plan by its name."""
        for label in self.labels:
            for part in ("both", "weights", "inputs") if parse_label(label).activations else ("both",):
                plan = self._everywhere(label)
                yield f"{label} {part}", Plan(plan, part, self._about(plan, part), {})
        for low, high in (menu for menu in MENUS if {*menu} <= {*self.labels}):
            rule = {u.name: self._format(u.name, high if _ATTENTION.search(u.name) else low) for u in self.job.units}
            yield f"rule {low} {high}", Plan(rule, "both", self._about(rule, "both"), {})
            size = stored_bytes(self.job.units, rule)
            yield from self._mixed(low, high, size, {"rule": f"rule {low} {high}"})
            for bpw in self.budgets:
                yield from self._mixed(low, high, int(bpw * self._weights / 8), {})

        for wanted in self.single:
            label, _, part = wanted.partition(":")
            for unit in (u.name for u in self.job.units if any(f.label == label for f in self._menu[u.name])):
                plan = {**self._everywhere(UNQUANTIZED), unit: self._format(unit, label)}
                about = {"predicted": self._about({unit: plan[unit]}, part or "both")["predicted"]}
                yield f"single {wanted} {unit}", Plan(plan, part or "both", about, {})

    def _mixed(self, low: str, high: str, budget: int, rivals: dict[str, str]) -> Iterator[tuple[str, Plan]]:
        """The plan of least predicted loss, and the largest uniform plan that fits as its rival."""
        wanted = {low, high, UNQUANTIZED}
        menu = {u: tuple(f for f in formats if f.label in wanted) for u, formats in self._menu.items()}
        scores = self.table.scores[self.job.settings.metric]
        plan = solve(build_problem(self.job.units, menu, scores, {}), budget).formats
        uniform = {label: stored_bytes(self.job.units, self._everywhere(label)) for label in (low, high)}
        fitting = [label for label, size in uniform.items() if size <= budget]
        if fitting:
            rivals = rivals | {"uniform": f"{max(fitting, key=lambda label: uniform[label])} both"}
        name = f"mixed {low} {high} {8 * budget / self._weights:.2f}"
        yield name, Plan(plan, "both", self._about(plan, "both"), rivals)

    @cached_property
    def _menu(self) -> dict[str, Sequence[QuantFormat]]:
        return dict(job_menu(self.job, None))

    @property
    def _weights(self) -> int:
        return sum(unit.num_weights for unit in self.job.units)

    def _format(self, unit: str, label: str) -> QuantFormat:
        """A format where a unit takes it, else 16 bits."""
        return next((fmt for fmt in self._menu[unit] if fmt.label == label), parse_label(UNQUANTIZED))

    def _everywhere(self, label: str) -> UnitFormats:
        return {unit.name: self._format(unit.name, label) for unit in self.job.units}

    def _about(self, plan: UnitFormats, part: str) -> dict[str, Any]:
        """Stored bits per weight, and the predicted loss by metric."""
        inputs = sum(self.table.curvature[unit].get(f"inputs {fmt.label}", 0.0) for unit, fmt in plan.items())
        totals = {m: predicted_loss(plan, scores, {}) or 0.0 for m, scores in self.table.scores.items()}
        predicted = {"both": totals, "weights": {m: t - inputs for m, t in totals.items()}}
        stored = stored_bytes([unit for unit in self.job.units if unit.name in plan], plan)
        bpw = 8 * stored / self._weights
        return {"bpw": bpw, "predicted": predicted.get(part, dict.fromkeys(totals, inputs))}

    def _by_text(self, rows: Tensor) -> dict[str, list[float]]:
        """Mean and standard error of ``[rows]`` on each text."""
        parts = zip(self.texts, rows.split([len(tokens) for tokens in self.texts.values()]), strict=True)
        return {name: [float(part.mean()), float(part.std() / len(part) ** 0.5)] for name, part in parts}

    def _input_formats(self, plan: UnitFormats, peaks: dict[str, float]) -> dict[str, ActivationFormat]:
        """How engines round the inputs of linears under a plan."""
        kinds = {unit: fmt.activation_format for unit, fmt in plan.items() if fmt.activation_format is not None}
        kinds |= {u: replace(k, divisor=divisor_of_peak(peaks[u])) for u, k in kinds.items() if k and k.has_divisor}
        return {m.name: kind for unit in self.job.units for m in unit.members if (kind := kinds.get(unit.name))}

    @torch.no_grad()
    def divergences(self, plans: dict[str, Plan]) -> dict[str, Tensor]:
        """KL of every row by plan, ``[rows]`` float64."""
        job, judged, size = self.job, torch.cat(list(self.texts.values())), self.job.settings.batch_size
        original, stream, rounding = job.stream(), job.stream(), job.rounding(self._menu)
        reference = original.final_hidden(judged, size, lambda _: None)
        divided = {unit for unit, formats in self._menu.items() if any(fmt.has_input_divisor for fmt in formats)}
        peaks = input_peaks(job.stream(), self.calibration.tokens, size, divided) if divided else {}
        inputs = {n: {} if p.part == "weights" else self._input_formats(p.formats, peaks) for n, p in plans.items()}
        known = stream.embed(
            self.calibration.tokens, size, job.holds_out_tokens, importance=self.calibration.importance
        )
        first = stream.embed(judged, size)
        states = {name: Activations(copy(first.hidden), first.calls) for name in plans}
        for spec in stream.structure.blocks:
            with stream.block(spec.index) as block:
                found: dict[str, dict[str, Tensor]] = {}
                for group, statistics in group_statistics(block, known, spec.input_groups, whole=True):
                    for name, by_label in rounding.roundings(block, group, statistics).items():
                        found[name] = {label: dequantize(*one.rounded) for label, one in by_label.items()}
                for name, plan in plans.items():
                    with rounded_inputs(block, inputs[name]), block.with_weights(_weights(block, found, plan)):
                        advance(block, states[name])
        comparison = OutputComparison(original, stream, judged, reference)
        finals = {name: torch.cat(list(seen.hidden)) for name, seen in states.items()}
        return {name: rows.double().cpu() for name, rows in comparison.divergences(finals, _as_it_is).items()}


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of the ranks of two lists without ties."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _as_it_is(_: str) -> nullcontext[None]:
    """The output head of every plan."""
    return nullcontext()


def _weights(block: LoadedBlock, found: dict[str, dict[str, Tensor]], plan: Plan) -> dict[str, Tensor]:
    """Rounded weights of a block under a plan; none where inputs alone are rounded."""
    if plan.part == "inputs":
        return {}
    chosen = {linear: plan.formats[linear.unit].label for linear in block.spec.linears if linear.name in found}
    return {
        linear.name: found[linear.name][label].to(block.parameter(linear).dtype)
        for linear, label in chosen.items()
        if label != UNQUANTIZED
    }


if __name__ == "__main__":
    raise SystemExit(main())
