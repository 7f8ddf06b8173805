"""The plans of a run against each other: which are tried, which is shipped, how they compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.second_cost import meets_second_budget
from hawqtool.allocation.uniform import UniformCandidate, neighbours
from hawqtool.evaluation.divergence import as_record, interpolate_log, paired_difference
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.pipeline.search.exchange import exchanged
from hawqtool.pipeline.search.trials import Candidate, Workbench
from hawqtool.records import BitPlan, Evaluation
from hawqtool.sensitivity.measured_kl import UnitScores

DECISIVE = 2.0
"""Paired standard errors by which a mixed plan must be better than uniform to be shipped in its place."""


@dataclass(frozen=True)
class Contest:
    """What was tried at a budget.

    Args:
        mixed: Plans of the short list by name, the configured metric's own first.
        uniform: ``uniform`` (the largest that fits the budget), ``below`` and ``above`` the best mixed plan's bytes,
            as far as they exist.
        best: Name of the mixed plan with the lowest divergence on the selection rows.
    """

    mixed: dict[str, Candidate]
    uniform: dict[str, Candidate]
    best: str


def hold(bench: Workbench, plans: dict[str, BitPlan], scores: UnitScores) -> Contest:
    """Try a short list, the best uniform plan that fits, and the uniform neighbours to interpolate with.

    Args:
        bench: Rounds and evaluates.
        plans: The short list.
        scores: Those behind its first plan, by unit and format; exchanges begin with them.
    """
    mixed: dict[str, Candidate] = {}
    for name, plan in plans.items():
        mixed[name] = bench.attempt(name, plan)
        bench.keep_only([_best(mixed)])
    _exchange(bench, mixed, scores)
    best = _best(mixed)
    job, plan = bench.job, best.plan
    # Uniform plans may have what the mixed one has, even where a plan file says more than the configuration.
    kind = plan.symmetric, {*job.config.group_sizes, *(fmt.group_size for fmt in plan.formats.values())}
    below, above = neighbours(job.units, plan.stored_bytes, *kind)
    largest, _ = neighbours(job.units, max(plan.budget_bytes or 0, plan.stored_bytes), *kind)
    if below is not None and below.stored_bytes == plan.stored_bytes:
        above = None
    wanted = {"uniform": largest, "below": below, "above": above}
    uniform: dict[str, Candidate] = {}
    for name, candidate in wanted.items():
        if candidate is not None:
            uniform[name] = bench.attempt(f"uniform {candidate.label}", _as_plan(job, candidate))
            bench.keep_only([best, uniform.get("uniform", best)])
    return Contest(mixed, uniform, next(name for name, candidate in mixed.items() if candidate is best))


def _exchange(bench: Workbench, mixed: dict[str, Candidate], scores: UnitScores) -> None:
    """Add plans that rounds of exchanges give: the first at the best one so far, each other at what the last gave.

    A round that makes a plan worse is no reason to stop: the next one knows what it measured.
    """
    latest = _best(mixed)
    budget = latest.plan.budget_bytes
    if bench.job.config.plan is not None or budget is None:
        return
    for number in range(1, bench.job.exchanges + 1):
        plan, scores = exchanged(bench, latest, budget, scores)
        if any(plan.formats == candidate.plan.formats for candidate in mixed.values()):
            break
        latest = mixed[f"exchange {number}"] = bench.attempt(f"exchange {number}", plan)
        bench.keep_only([_best(mixed), latest])


def _best(mixed: dict[str, Candidate]) -> Candidate:
    return min(mixed.values(), key=lambda candidate: candidate.selection)


def _as_plan(job: Job, candidate: UniformCandidate) -> BitPlan:
    weights = sum(unit.num_weights for unit in job.units)
    return BitPlan(candidate.formats, stored_bytes(job.units, candidate.formats), weights)


def choose(job: Job, contest: Contest) -> str:
    """``mixed`` or ``uniform``: what is shipped; a plan file is shipped as given.

    Uniform wins ties: the best mixed plan must be better on the selection rows by more than `DECISIVE` paired standard
    errors. Under ``target_kl``, where the mixed plan is as small as the search could make it, a uniform plan of no more
    bytes that meets the bound is no worse by that measure, so it is shipped.
    """
    mixed, uniform = contest.mixed[contest.best], contest.uniform.get("uniform")
    if job.config.plan is not None or uniform is None:
        return "mixed"
    if mixed is uniform:
        return "uniform"
    if not obeys(job, uniform.plan):
        return "mixed"
    bound = job.config.target_kl
    if bound is not None:
        return "uniform" if worst_divergence(uniform) <= bound else "mixed"
    difference, stderr = paired_difference(mixed.quality["selection"], uniform.quality["selection"])
    return "mixed" if difference < -DECISIVE * stderr else "uniform"


def worst_divergence(candidate: Candidate) -> float:
    """The larger of the divergences on the selection and on the report rows."""
    return max(evaluation.divergence for evaluation in candidate.quality.values())


def obeys(job: Job, plan: BitPlan) -> bool:
    """Whether a plan respects pins and second budget, and the widths, group size and profile that were asked for."""
    config = job.config
    if not meets_second_budget(config, job.units, plan.formats):
        return False
    if any(plan.formats[unit].bits != fmt.bits for unit, fmt in job.pins.items()):
        return False
    menu = job_menu(job, None)
    fixed_widths = config.bits is not None or config.profile == "portable"
    for unit, fmt in plan.formats.items():
        if fixed_widths and fmt.bits not in {f.bits for f in menu[unit]}:
            return False
        if "group_size" in config.model_fields_set and fmt.group_size not in {f.group_size for f in menu[unit]}:
            return False
    return True


def compare(contest: Contest, original: Evaluation, predict: Callable[[BitPlan], dict[str, float]]) -> dict[str, Any]:
    """The report's ``evaluation``: every plan that was tried, on the report rows, with paired differences.

    Args:
        contest: What was tried.
        original: The original model on the report rows.
        predict: Gives the predicted loss of a plan by metric.
    """
    mixed, uniform = contest.mixed[contest.best], contest.uniform.get("uniform")
    measure = original.measure

    def record(candidate: Candidate) -> dict[str, Any]:
        chose = as_record(candidate.quality["selection"])
        return candidate.record() | {"selection": chose, "predicted": predict(candidate.plan)}

    result: dict[str, Any] = {
        "measure": measure,
        "original": as_record(original),
        "mixed": record(mixed) | {"chosen_by": contest.best},
        "uniform": None,
    }
    points = {c.plan.stored_bytes: c.quality["report"].divergence for c in contest.uniform.values()}
    value = interpolate_log(sorted(points.items()), mixed.plan.stored_bytes)
    interpolated = None if value is None else {measure: value, "stored_bytes": mixed.plan.stored_bytes}
    result["uniform_interpolated"] = interpolated
    result["neighbours"] = {n: record(contest.uniform[n]) for n in ("below", "above") if n in contest.uniform}
    result["tried"] = {
        name: record(candidate) | _differences(candidate, uniform) for name, candidate in contest.mixed.items()
    }
    if uniform is not None:
        result["uniform"] = record(uniform)
        result["mixed_minus_uniform"] = _paired(mixed, uniform, "report")
        result["selection"] = {
            "mixed_minus_uniform": (chosen := _paired(mixed, uniform, "selection"))[measure],
            "stderr": chosen[f"{measure}_stderr"],
        }
    return result


def _differences(candidate: Candidate, uniform: Candidate | None) -> dict[str, Any]:
    """Paired differences to uniform by set of rows, and the predicted loss in the scores that made the plan."""
    roles = candidate.quality if uniform is not None else ()
    return {
        "minus_uniform": {role: _paired(candidate, uniform, role) for role in roles if uniform is not None},
        "predicted_loss": candidate.plan.predicted_loss,
    }


def _paired(first: Candidate, second: Candidate, role: str) -> dict[str, float]:
    measure = first.quality[role].measure
    difference, stderr = paired_difference(first.quality[role], second.quality[role])
    return {measure: difference, f"{measure}_stderr": stderr}
