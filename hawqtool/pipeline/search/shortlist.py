"""Other plans that are worth trying beside the chosen metric's own: those of other metrics, and the rule's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hawqtool.allocation.frontier import solve
from hawqtool.allocation.problem import build_problem, predicted_loss
from hawqtool.allocation.role_rule import role_plan
from hawqtool.allocation.uniform import uniform_plans
from hawqtool.evaluation.divergence import interpolate_log
from hawqtool.formats import parse_label
from hawqtool.records import BitPlan, Menu, SensitivityTable, Unit, UnitFormats, UnitScores

RULE = "by-role rule"
"""Name of the plan of `hawqtool.allocation.role_rule`, which is tried beside every mixed plan."""

FAR_ABOVE = 2.0
"""Predicted loss, relative to the mixed plan's, above which a rival is not rounded where predictions are proof enough.

Plans that are nearer each other may come out in the other order: of MPNet at 3.25 bits, the mixed plan that was
predicted to be better was measured to be worse (an error of 0.215 against 0.177)."""


def alternatives(
    units: Sequence[Unit],
    menu: Menu,
    table: SensitivityTable,
    pins: UnitFormats,
    own: BitPlan,
    budget: int,
) -> dict[str, BitPlan]:
    """Plans of the other metrics at the same budget, without repetitions.

    They are ordered by `pair_loss` where the table has what that needs, so that a short list takes the plans that
    pair terms prefer. Pair terms only compare a few plans here: a plan that minimises them overfits their noise.
    """
    plans: dict[str, BitPlan] = {}
    for metric, scores in table.scores.items():
        if metric != own.metric:
            plans[metric] = solve(build_problem(units, menu, scores, pins), budget, metric)
    seen, distinct = [own.formats], dict[str, BitPlan]()
    for name, plan in plans.items():
        # A plan of one format is uniform, which competes anyway.
        if plan.formats not in seen and len(set(plan.formats.values())) > 1:
            seen.append(plan.formats)
            distinct[name] = plan
    if not table.projections:
        return distinct
    return dict(sorted(distinct.items(), key=lambda item: pair_loss(item[1], table)))


def rule_plan(
    units: Sequence[Unit], menu: Menu, table: SensitivityTable, pins: UnitFormats, own: BitPlan, budget: int
) -> BitPlan:
    """The plan of the rule that people use at the same budget; the scores of ``own`` say what it begins with."""
    problem = build_problem(units, menu, table.scores[own.metric or next(iter(table.scores))], pins)
    return role_plan(problem, units, budget)


def predicted_ratio(
    units: Sequence[Unit], rival: BitPlan, own: BitPlan, scores: UnitScores, pins: UnitFormats
) -> float | None:
    """Predicted loss of a rival relative to a plan's own.

    A uniform rival in formats that were not measured, such as groups of another size, is taken to lie on the curve of
    the measured uniform plans, log-linear in bytes between two of them.

    Returns:
        None where that is not known, or the own loss is not positive.
    """
    loss, least = (predicted_loss(plan.formats, scores, pins) for plan in (rival, own))
    if loss is None:
        sizes = {fmt.group_size for formats in scores.values() for fmt in map(parse_label, formats)}
        curve = [
            (plan.stored_bytes, known)
            for plan in uniform_plans(units, rival.symmetric, sizes)
            if (known := predicted_loss(plan.formats, scores, pins)) is not None
        ]
        loss = interpolate_log(curve, rival.stored_bytes)
    return loss / least if loss is not None and least is not None and least > 0 else None


def pair_loss(plan: BitPlan, table: SensitivityTable) -> float:
    """½ E(Σ_u p_u)² / outputs: the predicted loss of a whole plan with the terms between units.

    p_u is the projection of a row's gradient on the unit's rounding error. Its sum over units, squared and averaged
    over rows, is an unbiased estimate of dᵀFd for the whole change d of the plan, of relative deviation √(2/rows).
    Pinned formats that were not measured count as 0 in every plan alike.
    """
    measured = [
        torch.tensor(table.projections[unit][fmt.label], dtype=torch.float64)
        for unit, fmt in plan.formats.items()
        if fmt.label in table.projections.get(unit, {})
    ]
    return float(torch.stack(measured).sum(0).square().mean()) / 2 if measured else 0.0
