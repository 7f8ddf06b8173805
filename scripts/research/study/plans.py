"""Plans of equal bytes, rounded and evaluated on held-out rows: what a better prediction is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hawqtool.allocation.baselines import permuted_scores, reversed_scores
from hawqtool.allocation.problem import AllocationProblem, build_problem, stored_bytes
from hawqtool.allocation.role_rule import role_plan
from hawqtool.allocation.uniform import neighbours
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.evaluation.divergence import OutputComparison, interpolate_log, standard_error
from hawqtool.formats import parse_label
from hawqtool.model.block import LoadedBlock
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.search.planner import allocate
from hawqtool.pipeline.search.width_swap import neighbouring, swap_widths
from hawqtool.records import Evaluation, UnitFormats, UnitScores
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.spec import InputGroups, RoundingSpec
from hawqtool.runtime.reporter import Reporter
from hawqtool.sensitivity.measured_kl import pairs_of_scores, scores_of_pairs
from hawqtool.streaming.block import advance
from hawqtool.streaming.input_statistics import collect_statistics
from hawqtool.streaming.stream import WeightSource
from study.scores import predicted_sums
from study.setting import Findings, Setting

KINDS = ("metric", "width swap", "uniform", "random", "reversed", "rule")


@dataclass(frozen=True)
class Candidate:
    """A plan to judge: its name, its kind (one of `KINDS`) and its formats by unit."""

    name: str
    kind: str
    formats: UnitFormats


def candidates(
    setting: Setting, scores: Mapping[str, UnitScores], reference: str, budget: int, seeds: int
) -> Iterator[Candidate]:
    """Plans within a budget of bytes: of every metric, uniform ones, and what they should beat.

    Args:
        setting: Model and formats.
        scores: Scores by metric.
        reference: Metric whose scores are permuted and turned round.
        budget: Most stored bytes.
        seeds: Random plans.
    """
    units, menu, base = setting.job.units, setting.menu, scores[reference]
    hull = setting.job.config.model_copy(update={"solver": "hull"})

    def solved(by_unit: UnitScores) -> UnitFormats:
        return allocate(units, menu, by_unit, {}, budget, reference, hull).formats

    # Uniform first: a run that is cut should have its yardstick.
    around = neighbours(units, budget, setting.job.config.symmetric, setting.job.config.group_sizes)
    for side, uniform in zip(("below", "above"), around, strict=True):
        if uniform is not None:
            yield Candidate(f"uniform {side} ({uniform.label})", "uniform", uniform.formats)
    for metric, found in scores.items():
        yield Candidate(metric, "metric", solved(found))
    for seed in range(seeds):
        yield Candidate(f"random {seed}", "random", solved(permuted_scores(units, base, seed)))
    yield Candidate("reversed", "reversed", solved(reversed_scores(units, base)))
    yield Candidate("rule", "rule", role_plan(build_problem(units, menu, base, {}), units, budget).formats)


class PlanEvaluator:
    """Rounds plans and compares them with the original on the held-out rows, without writing them.

    Args:
        setting: Model and rows.
        reporter: Progress.
    """

    def __init__(self, setting: Setting, reporter: Reporter) -> None:
        self.setting, self.reporter = setting, reporter
        self.stream = setting.job.stream()
        self.original = self.stream.final_hidden(
            setting.heldout.tokens, setting.job.settings.batch_size, self._progress("evaluating original")
        )

    def _progress(self, phase: str) -> Any:
        count = len(self.setting.job.structure.blocks)
        return lambda index: self.reporter.progress(phase, index + 1, count)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Quality of a plan: what evaluating its written folder would give. Its weights stay until the next one."""
        job, rows = self.setting.job, self.setting.heldout
        self.weights: dict[str, Tensor] = {}
        progress = self._progress(f"judging {candidate.name}")
        stream = job.stream()
        calibration, method = self.setting.calibration, job.settings.method
        needs = method.needs_held_out, method.needs_drift
        known = stream.embed(calibration.tokens, job.settings.batch_size, *needs, calibration.importance)
        held = stream.embed(rows.tokens, job.settings.batch_size)
        rounding = RoundingSpec.of_plan(method, candidate.formats, job.stored_dtypes)
        with torch.no_grad():
            for spec in job.structure.blocks:
                with stream.block(spec.index) as block:
                    collect_statistics(block, known, _Rounder(rounding, block, self.weights))
                    advance(block, held)
                progress(spec.index)
            if stream.head:
                statistics = stream.head_statistics(calibration.tokens, known)
                _Rounder(rounding, stream.head, self.weights)([(stream.head.spec.input_groups[0], statistics)])
            return OutputComparison(self.stream, stream, rows.tokens, self.original).evaluation(
                torch.cat(list(held.hidden))
            )

    def swap_widths(self, candidate: Candidate, budget: int, expected: UnitScores) -> tuple[UnitFormats, UnitScores]:
        """The plan that swaps at ``candidate`` give, measured on the scoring rows, and the scores behind it."""
        job = self.setting.job
        self.evaluate(candidate)
        quantized = job.stream(Overlay(TensorReader(job.index), self.weights))
        menu = neighbouring(self.setting.menu, candidate.formats, set())
        sets = {"calibration": self.setting.calibration, "scoring": self.setting.scoring}
        context = RunContext(job, self.reporter)
        plan, scores = swap_widths(context, quantized, candidate.formats, menu, sets, budget, expected)
        return plan.formats, scores


@dataclass(frozen=True)
class Overlay:
    """A checkpoint in which some weights are others; names are without ``.weight``."""

    below: WeightSource
    weights: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """Tensor of that name, on the CPU."""
        found = self.weights.get(name.removesuffix(".weight"))
        return self.below.tensor(name) if found is None else found

    def __contains__(self, name: object) -> bool:
        return name in self.below


@dataclass(frozen=True)
class _Rounder:
    """Puts rounded weights in the place of those of an input group."""

    rounding: RoundingSpec
    block: LoadedBlock
    weights: dict[str, Tensor]

    def __call__(self, groups: InputGroups) -> None:
        for group, statistics in groups:
            roundings = self.rounding.roundings(self.block, group, statistics)
            for linear in (linear for linear in group if linear.name in roundings):
                (found,) = roundings[linear.name].values()
                weight = dequantize(*found.rounded)
                self.block.set_weight(linear, weight)
                self.weights[linear.name] = (weight.t() if linear.transposed else weight).cpu()


def study_plans(
    setting: Setting,
    budgets: Sequence[float],
    reference: str,
    seeds: int,
    swaps: int,
    findings: Findings,
    reporter: Reporter,
) -> None:
    """Judge every plan of every budget that is not in the findings; plans that are equal are judged once.

    Swaps start from the plan of the reference metric; each round starts from what the one before gave.
    """
    scores = {metric: scores_of_pairs(found) for metric, found in findings.data["scores"].items()}
    units = setting.job.units
    weights = sum(unit.num_weights for unit in units)
    evaluator: PlanEvaluator | None = None
    for target in budgets:
        budget = AllocationProblem({}, weights).budget_bytes(target)
        listed = findings.data["plans"].get(str(target), [])
        known = {entry["name"] for entry in listed}
        wanted = list(candidates(setting, scores, reference, budget, seeds))
        latest = next(candidate for candidate in wanted if candidate.name == reference)
        expected = scores[reference]
        for step in (*wanted, *range(1, swaps + 1)):
            if isinstance(step, int):
                name = f"width swap {step}"
                evaluator = evaluator or PlanEvaluator(setting, reporter)
                if name in known:
                    labels = next(entry for entry in listed if entry["name"] == name)["evaluation"].split(",")
                    known_labels = zip(units, labels, strict=True)
                    formats: UnitFormats = {u.name: parse_label(label) for u, label in known_labels}
                    expected = scores_of_pairs(findings.data["swapped"][f"{target} {step}"])
                else:
                    formats, expected = evaluator.swap_widths(latest, budget, expected)
                    findings.data["swapped"][f"{target} {step}"] = pairs_of_scores(expected)
                candidate = latest = Candidate(name, "width swap", formats)
            else:
                candidate = step
            if candidate.name in known:
                continue
            labels = {unit: fmt.label for unit, fmt in candidate.formats.items()}
            key = ",".join(labels[unit.name] for unit in units)
            if key not in findings.data["evaluations"]:
                evaluator = evaluator or PlanEvaluator(setting, reporter)
                reporter.say(f"{target} bits: {candidate.name}")
                evaluation = evaluator.evaluate(candidate)
                findings.data["measure"] = evaluation.measure
                findings.data["evaluations"][key] = asdict(evaluation)
            listed.append(_entry(candidate, scores, labels, stored_bytes(units, candidate.formats), weights, key))
            findings.data["plans"][str(target)] = list(listed)
            findings.save()


def _entry(
    candidate: Candidate,
    scores: Mapping[str, UnitScores],
    labels: Mapping[str, str],
    stored: int,
    weights: int,
    key: str,
) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "stored_bytes": stored,
        "bpw": 8 * stored / weights,
        "predicted": predicted_sums(scores, labels),
        "evaluation": key,
    }


def plan_rows(findings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All plans with their divergence and its paired difference to uniform plans of the same bytes.

    The uniform curve between two plans a and b is exp of a mean of logarithms, with the share s. Its row values are
    those to first order, U ((1 - s) a_n / A + s b_n / B), which average to U; so differences to it are paired by rows.
    """
    evaluations = findings["evaluations"]
    uniform: dict[int, list[float]] = {
        entry["stored_bytes"]: evaluations[entry["evaluation"]]["row_divergence"]
        for entries in findings["plans"].values()
        for entry in entries
        if entry["kind"] == "uniform"
    }
    rows = []
    for budget, entries in findings["plans"].items():
        for entry in entries:
            evaluation = evaluations[entry["evaluation"]]
            row = {key: value for key, value in entry.items() if key != "evaluation"}
            row |= {key: evaluation[key] for key in ("divergence", "stderr", "perplexity", "same_top", "cosine")}
            values = torch.tensor(evaluation["row_divergence"], dtype=torch.float64)
            curve = _curve(uniform, entry["stored_bytes"])
            difference = None if curve is None else values - curve
            row["budget"] = float(budget)
            row["uniform"] = None if curve is None else float(curve.mean())
            row["minus_uniform"] = None if difference is None else float(difference.mean())
            row["minus_uniform_stderr"] = None if difference is None else standard_error(difference)
            rows.append(row)
    return rows


def _curve(uniform: Mapping[int, Sequence[float]], stored: int) -> Tensor | None:
    """Row values of the uniform curve at so many bytes; None outside of it."""
    means = sorted((size, math.fsum(values) / len(values)) for size, values in uniform.items())
    level = interpolate_log(means, stored)
    if level is None:
        return None
    below, above = max(s for s, _ in means if s <= stored), min(s for s, _ in means if s >= stored)
    share = (stored - below) / (above - below) if above > below else 0.0
    first, second = (torch.tensor(uniform[size], dtype=torch.float64) for size in (below, above))
    return level * ((1 - share) * first / first.mean() + share * second / second.mean())
