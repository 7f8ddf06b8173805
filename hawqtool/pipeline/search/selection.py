"""The plans of a run against each other: which are tried, which is shipped, how they compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import UniformPlan, best_uniform
from hawqtool.evaluation.divergence import as_record, paired_difference
from hawqtool.evaluation.paired import PairedDifference, compare_paired
from hawqtool.formats import UNQUANTIZED
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.menu import job_menu, within_second_budget
from hawqtool.pipeline.search.gradient_swap import moved_by_gradient
from hawqtool.pipeline.search.layerwise import LayerwiseProof, compare_layerwise
from hawqtool.pipeline.search.shortlist import FAR_ABOVE, RULE, predicted_ratio
from hawqtool.pipeline.search.trials import Trial, TrialRunner, formats_key
from hawqtool.pipeline.search.width_swap import swapped
from hawqtool.records import BitPlan, Evaluation
from hawqtool.report.plan_comparison import (
    Divergence,
    PlanComparison,
    PlanQuality,
    Shipped,
    SwapAttempt,
    UnroundedRival,
)
from hawqtool.sensitivity.measured_kl import UnitScores

DRAW_NOISE = 0.04
"""Standard error of a plan's difference to uniform by the draw of calibration rows, as a share of uniform's divergence.

Over three draws at 3.25 bits, of three models, the difference has a standard deviation of 0 to 3.4 % on each of three
texts, uniform plans themselves of 1 to 3.9 %. Rows that choose do not show it.
"""


@dataclass(frozen=True)
class Selection:
    """What was tried at a budget.

    Args:
        mixed: Plans of the short list by name, the configured metric's own first.
        uniform: The largest uniform plan that fits the budget, if there is one.
        best: Name of the mixed plan with the lowest divergence on the selection rows.
        swaps: Plans that were tried on the way of swaps by gradient, without being rounded for it.
        not_rounded: Rivals by name, of which the predicted loss, or a layerwise comparison, was proof enough.
        proof: That comparison, where there was one; without a uniform plan it decided, else it chose the mixed one.
    """

    mixed: dict[str, Trial]
    uniform: Trial | None
    best: str
    swaps: list[SwapAttempt] = field(default_factory=list)
    not_rounded: dict[str, UnroundedRival] = field(default_factory=dict)
    proof: LayerwiseProof | None = None

    @property
    def minus_uniform(self) -> PairedDifference | None:
        """The best mixed plan less the uniform one on the selection rows; None where one is missing or both are one."""
        if self.proof is not None and self.uniform is None:
            return self.proof.minus_uniform(self.best)
        mixed, uniform = self.mixed[self.best], self.uniform
        if uniform is None or uniform is mixed or "selection" not in uniform.quality:
            return None
        return compare_paired(mixed.quality["selection"], uniform.quality["selection"])

    @property
    def tried(self) -> int:
        """Mixed plans among which the best was found."""
        return len(self.mixed) if self.proof is None else self.proof.tried


def try_plans(runner: TrialRunner, plans: dict[str, BitPlan], scores: UnitScores) -> Selection:
    """Try a short list, and the largest uniform plan that fits.

    Args:
        runner: Rounds and evaluates.
        plans: The short list.
        scores: Those behind its first plan, by unit and format; swaps begin with them.
    """
    job, own = runner.context.job, next(iter(plans.values()))
    if job.settings.proof == "layerwise" and scores and "calibration" in runner.sets:
        return _compared(runner, plans)
    if runner.context.ranks.size > 1:
        runner.round_ahead(_foreseen(job, plans, scores))
    if len(plans) == 1 and (job.config.plan is not None or (job.config.is_uniform and not job.pins)):
        runner.certain = formats_key(own.formats)
    mixed, not_rounded = dict[str, Trial](), dict[str, UnroundedRival]()
    for name, plan in plans.items():
        if name == RULE and (far := _far_above(job, plan, own, scores)):
            not_rounded[name] = far
            continue
        mixed[name] = runner.run_trial(name, plan)
        runner.keep_only([_best(mixed)])
    attempts = _swap(runner, mixed, scores)
    best = _best(mixed)
    plan = best.plan
    if job.config.is_uniform:  # there is no budget for others to compete in
        (name,) = mixed
        return Selection(mixed, None if job.pins else best, name, attempts)
    largest, uniform = _largest_uniform(job, plan), None
    if largest is not None:
        label, rival = largest
        if far := _far_above(job, rival, own, scores):
            not_rounded[label] = far
        else:
            uniform = runner.run_trial(label, rival)
    found = next(name for name, trial in mixed.items() if trial is best)
    return Selection(mixed, uniform, found, attempts, not_rounded)


def _compared(runner: TrialRunner, plans: dict[str, BitPlan]) -> Selection:
    """Let a layerwise comparison choose: a mixed plan that is better for sure is all that is carried out.

    Where it is not, the best uniform plan is carried out too: without output feedback all plans of few bits are far
    from the original, and nearer to each other than they will be. So is the metric's own plan, where another one is
    the best of plans that are that far.
    """
    job, uniform = runner.context.job, _largest_uniform(runner.context.job, next(iter(plans.values())))
    proof = compare_layerwise(runner, plans, uniform)
    best, difference = proof.best, proof.minus_uniform(proof.best)
    sure = uniform is None or difference is None or _is_better(difference, proof.tried) or not obeys(job, uniform[1])
    rival = None if sure else uniform
    if rival is None and not proof.doubts:
        runner.certain = formats_key(proof.plans[best].formats)
        mixed = {best: runner.run_trial(best, proof.plans[best], ("report",))}
        return Selection(mixed, None, best, not_rounded=proof.rivals(best, {best}), proof=proof)
    names = [best, next(iter(plans))] if proof.doubts else [best]
    mixed = {name: runner.run_trial(name, proof.plans[name]) for name in names}
    best = min(mixed, key=lambda name: mixed[name].selection)
    found = Selection(mixed, runner.run_trial(*rival) if rival else None, best, proof=proof)
    shipped = rival[0] if rival and choose(job, found) == "uniform" else best
    return replace(found, not_rounded=proof.rivals(shipped, {*mixed, *(rival or ())[:1]}))


def _largest_uniform(job: Job, plan: BitPlan) -> tuple[str, BitPlan] | None:
    """The largest uniform plan that fits the budget of a plan, and its name; None where none does."""
    limit, special = max(plan.budget_bytes or 0, plan.stored_bytes), job.config.special_formats
    if special:
        return largest_special(job, limit)
    # Uniform plans may have what the mixed one has, even where a plan file says more than the configuration.
    kind = plan.symmetric, {*job.config.group_sizes, *(fmt.group_size for fmt in plan.formats.values())}
    largest = best_uniform(job.units, limit, *kind)
    return None if largest is None else (f"uniform {largest.label}", _as_plan(job, largest))


def largest_special(job: Job, limit: int) -> tuple[str, BitPlan] | None:
    """As `_largest_uniform`, of the formats of a menu that has floats or rounded inputs."""
    menu = job_menu(job, None).values()
    common = set.intersection(*(set(formats) for formats in menu)) if menu else set()
    plans = [UniformPlan(fmt.label, dict.fromkeys((u.name for u in job.units), fmt), 0) for fmt in sorted(common)]
    plans = [plan for plan in plans if plan.label != UNQUANTIZED]  # which is the original
    fitting = [plan for plan in plans if stored_bytes(job.units, plan.formats) <= limit]
    largest = max(fitting, key=lambda plan: stored_bytes(job.units, plan.formats), default=None)
    return None if largest is None else (f"uniform {largest.label}", _as_plan(job, largest))


def _foreseen(job: Job, plans: dict[str, BitPlan], scores: UnitScores) -> dict[str, BitPlan]:
    """Plans that are rounded whatever comes of each, by name; the uniform one is that beside the first plan."""
    own = next(iter(plans.values()))
    found = {name: plan for name, plan in plans.items() if name != RULE or not _far_above(job, plan, own, scores)}
    largest = None if job.config.is_uniform else _largest_uniform(job, own)
    if largest is not None and not _far_above(job, largest[1], own, scores):
        found |= [largest]
    return found


def _far_above(job: Job, rival: BitPlan, own: BitPlan, scores: UnitScores) -> UnroundedRival | None:
    """What is said of a rival in place of rounding it, where its predicted loss is proof enough; else None."""
    if job.settings.proof != "predicted":
        return None
    ratio = predicted_ratio(job.units, rival, own, scores, job.pins)
    if ratio is None or ratio <= FAR_ABOVE:
        return None
    labels = sorted({fmt.label for fmt in rival.formats.values()})
    return {"formats": labels, "stored_bytes": rival.stored_bytes, "bpw_linears": rival.bpw, "ratio": ratio}


def _swap(runner: TrialRunner, mixed: dict[str, Trial], scores: UnitScores) -> list[SwapAttempt]:
    """Add plans that rounds of swaps give: the first at the best one so far, each other at what the last gave.

    A round that makes a plan worse is no reason to stop: the next one knows what it measured. Rounds by gradient are
    judged as they go, so that only what they lead to is rounded; the plans on the way are returned.
    """
    latest, config = _best(mixed), runner.context.job.config
    budget, rounds = latest.plan.budget_bytes, runner.context.job.settings.swaps
    if config.plan is not None or budget is None or not rounds:
        return []
    if config.swap_scores == "gradient":
        plan, attempts = moved_by_gradient(runner, latest, budget, scores)
        if plan.formats != latest.plan.formats:
            mixed["width swap 1"] = runner.run_trial("width swap 1", plan)
            runner.keep_only([_best(mixed)])
        return attempts
    for number in range(1, rounds + 1):
        plan, scores = swapped(runner, latest, budget, scores)
        if any(plan.formats == trial.plan.formats for trial in mixed.values()):
            break
        latest = mixed[f"width swap {number}"] = runner.run_trial(f"width swap {number}", plan)
        runner.keep_only([_best(mixed), latest])
    return []


def _best(mixed: dict[str, Trial]) -> Trial:
    trials = list(mixed.values())
    return trials[0] if len(trials) == 1 else min(trials, key=lambda trial: trial.selection)


def _as_plan(job: Job, trial: UniformPlan) -> BitPlan:
    weights = sum(unit.num_weights for unit in job.units)
    plan = BitPlan(trial.formats, stored_bytes(job.units, trial.formats), weights)
    return within_second_budget(job.config, job.units, plan) or plan


def choose(job: Job, selection: Selection) -> Shipped:
    """``mixed`` or ``uniform``: what is shipped; a plan file is shipped as given.

    Uniform wins ties: the best mixed plan must be better on the selection rows for sure, by a paired t-test that knows
    how many mixed plans were tried (see `PairedDifference.is_less`) and what another draw of calibration rows may
    change. The report rows choose nothing.

    Under ``target_kl``, where the mixed plan is as small as the search could make it, a uniform plan of no more bytes
    that meets the bound is no worse by that measure, so it is shipped.
    """
    mixed, uniform = selection.mixed[selection.best], selection.uniform
    if job.config.plan is not None or uniform is None:
        return "mixed"
    if mixed is uniform:
        return "uniform"
    if not obeys(job, uniform.plan):
        return "mixed"
    bound = job.config.target_kl
    if bound is not None:
        return "uniform" if uniform.selection <= bound else "mixed"
    difference = selection.minus_uniform
    assert difference is not None  # both were evaluated
    return "mixed" if _is_better(difference, selection.tried) else "uniform"


def _is_better(difference: PairedDifference, tried: int) -> bool:
    """Whether the best of ``tried`` mixed plans is better than uniform for sure, with other calibration rows too."""
    return difference.is_less(tried, DRAW_NOISE * difference.base)


def obeys(job: Job, plan: BitPlan) -> bool:
    """Whether a plan respects pins and second budget, and the widths, group size and profile that were asked for."""
    config = job.config
    if within_second_budget(config, job.units, plan) is None:
        return False
    if any(plan.formats[unit].bits != fmt.bits for unit, fmt in job.pins.items()):
        return False
    menu = job_menu(job, None)
    fixed_widths = config.given_widths is not None or config.profile == "portable"
    for unit, fmt in plan.formats.items():
        if fixed_widths and fmt.bits not in {f.bits for f in menu[unit]}:
            return False
        if config.group_size is not None and fmt.group_size not in {f.group_size for f in menu[unit]}:
            return False
        if config.formats is not None and unit not in job.pins and fmt not in menu[unit]:
            return False
    return True


def compare(
    selection: Selection, original: Evaluation, predict: Callable[[BitPlan], dict[str, float]]
) -> PlanComparison:
    """The report's ``evaluation``: every plan that was tried, on the report rows, with paired differences.

    Args:
        selection: What was tried.
        original: The original model on the report rows.
        predict: Gives the predicted loss of a plan by metric.
    """
    mixed, uniform = selection.mixed[selection.best], selection.uniform

    def record(trial: Trial) -> PlanQuality:
        return trial.record(predict(trial.plan))

    result: PlanComparison = {
        "measure": "kl" if original.measure == "kl" else "embedding_error",
        "original": as_record(original),
        "mixed": {**record(mixed), "chosen_by": selection.best},
        "uniform": None if uniform is None else record(uniform),
        "tried": {
            name: {
                **record(trial),
                "minus_uniform": {role: _paired(trial, uniform, role) for role in trial.quality} if uniform else {},
                "predicted_loss": trial.plan.predicted_loss,
            }
            for name, trial in selection.mixed.items()
        },
    }
    if selection.swaps:
        result["swaps"] = selection.swaps
    if selection.not_rounded:
        result["not_rounded"] = selection.not_rounded
    if uniform is not None:
        result["mixed_minus_uniform"] = _paired(mixed, uniform, "report")
    difference = selection.minus_uniform
    if difference is not None:
        needed = difference.needed(selection.tried)
        result["selection"] = {
            "mixed_minus_uniform": difference.value,
            "stderr": difference.stderr,
            "errors_needed": needed if math.isfinite(needed) else None,
            "draw_stderr": DRAW_NOISE * difference.base,
            "plans": selection.tried,
            "by_source": {
                name: {"difference": value, "stderr": stderr} for name, (value, stderr) in difference.by_source.items()
            },
        }
    return result


def _paired(first: Trial, second: Trial, role: str) -> Divergence:
    """Difference of two plans on a set of rows, with its standard error."""
    value, stderr = paired_difference(first.quality[role], second.quality[role])
    if first.quality[role].measure == "kl":
        return {"kl": value, "kl_stderr": stderr}
    return {"embedding_error": value, "embedding_error_stderr": stderr}
