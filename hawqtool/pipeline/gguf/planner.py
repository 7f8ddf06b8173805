"""Which type each tensor of a GGUF file gets: budgets in stored bytes, measured scores, plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from hawqtool.allocation.frontier import Frontier, frontier
from hawqtool.allocation.problem import AllocationProblem, build_problem
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType
from hawqtool.errors import UsageError
from hawqtool.pipeline.gguf.ends import EndRounding, measure_ends
from hawqtool.pipeline.gguf.tensors import GgufJob
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.search.planner import allocate
from hawqtool.pipeline.stages.measure import check_scores, rows_of_measurement
from hawqtool.records import BitPlan, Menu, Rows, UnitFormats, UnitScores
from hawqtool.rounding.blocks.spec import BlockRounding
from hawqtool.runtime.reporter import Reporter
from hawqtool.sensitivity.measure import SweepSettings, measure
from hawqtool.sensitivity.measured_kl import pairs_of_scores, scores_of_pairs
from hawqtool.values import parse_size

_SCORES = "scores"


def types_of(plan: BitPlan) -> Mapping[str, BlockType]:
    """Type of every unit, which is a tensor."""
    return cast(Mapping[str, BlockType], plan.formats)


def stored_budget(gguf: GgufJob) -> int | None:
    """Most stored bytes of all units; None where each unit has one type, or a quality is the target.

    Raises:
        UsageError: If there is a choice and no target.
    """
    config, units = gguf.job.config, gguf.units
    if config.target_kl is not None:
        return None
    if config.target_bpw is not None:
        return AllocationProblem({}, sum(unit.num_weights for unit in units)).budget_bytes(config.target_bpw)
    if config.target_size is not None:
        cheapest = {name: min(kinds, key=lambda kind: kind.bits) for name, kinds in gguf.menu.items()}
        stored = sum(cheapest[unit.name].num_bytes(unit.num_weights) for unit in units)
        # Tensors begin at multiples of the alignment: a plan may lose almost that at each of them.
        others = gguf.layout(cheapest).total_bytes - stored + gguf.template.alignment * len(units)
        return parse_size(config.target_size) - others
    several = next((name for name, kinds in gguf.menu.items() if len(kinds) > 1), None)
    if several is None:
        return None
    raise UsageError(
        f"{several} may have {len(gguf.menu[several])} types; give --target-bpw, --target-size or --target-kl, or one "
        "of --block-types that fits all tensors"
    )


def announce(gguf: GgufJob, budget: int | None, reporter: Reporter) -> None:
    """Say before the work what is quantized, what stays, and which sizes are in reach."""
    weights = sum(unit.num_weights for unit in gguf.units)
    low, high = (
        gguf.layout({name: choose(kinds, key=lambda kind: kind.bits) for name, kinds in gguf.menu.items()}).total_bytes
        for choose in (min, max)
    )
    job, settings = gguf.job, gguf.job.settings
    reporter.say(f"model       {job.source.name}: {len(gguf.units)} tensors with {weights:,} weights to quantize")
    reporter.say(f"types       {', '.join(dict.fromkeys(kind.name for kinds in gguf.menu.values() for kind in kinds))}")
    for name in (name for name in gguf.ends if len(gguf.menu[name]) == 1):
        reporter.say(f"            {name} becomes {gguf.menu[name][0].name}, rounded by itself")
    target = "" if budget is None else f"; the target leaves {8 * budget / weights:.3f} bits per weight"
    reporter.say(f"size        files of {low:,} to {high:,} bytes are in reach{target}")
    rows = f"{settings.num_samples} rows of {settings.seq_len} tokens"
    reporter.say(f"work        {settings.method.name} on {rows}, {job.device}, seed {job.config.seed}")
    for name, reason in gguf.kept.items():
        reporter.say(f"kept        {name}: {reason}")


def check_feasible(gguf: GgufJob, budget: int) -> None:
    """Check before the work that the smallest types keep the budget.

    Raises:
        UsageError: Otherwise; states what is in reach.
    """
    weights = sum(unit.num_weights for unit in gguf.units)
    sizes = [[kind.num_bytes(unit.num_weights) for kind in gguf.menu[unit.name]] for unit in gguf.units]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    if budget < low:
        raise UsageError(
            f"the target of {8 * budget / weights:.3f} bits per weight cannot be met: {8 * low / weights:.3f} to "
            f"{8 * high / weights:.3f} are in reach; raise the target or add smaller --block-types"
        )


@dataclass(frozen=True)
class GgufPlanner:
    """Plans of a job for any budget.

    Args:
        context: The run; its store keeps plans, as a solver that stops by the clock may find another one next time.
        gguf: The job.
        scores: Of all units that have a choice.
        ends: How embedding and output are rounded.
    """

    context: RunContext
    gguf: GgufJob
    scores: UnitScores
    ends: EndRounding

    @property
    def metric(self) -> str | None:
        """What chose the types; None where there is no choice."""
        return self.gguf.job.settings.metric if self.scores else None

    @property
    def _fixed(self) -> UnitFormats:
        return cast(UnitFormats, {name: kinds[0] for name, kinds in self.gguf.menu.items() if len(kinds) == 1})

    def plan(self, budget: int | None) -> BitPlan:
        """The plan of least predicted loss within a budget; None where nothing is to be chosen."""
        gguf, job = self.gguf, self.gguf.job
        if budget is None:
            budget = sum(gguf.menu[unit.name][0].num_bytes(unit.num_weights) for unit in gguf.units)
        key, fixed = f"plan-{budget}", self._fixed
        known = self.context.saved.load(key)
        if known is not None:
            fixed = cast(UnitFormats, {name: BLOCK_TYPES[kind] for name, kind in known.items()})
        menu = cast(Menu, gguf.menu)
        plan = allocate(gguf.units, menu, self.scores, fixed, budget, job.settings.metric, job.config)
        self.context.saved.save(key, {name: kind.label for name, kind in plan.formats.items()})
        return plan

    def curve(self) -> Frontier:
        """The whole frontier of predicted loss."""
        return frontier(build_problem(self.gguf.units, cast(Menu, self.gguf.menu), self.scores, self._fixed))


def make_gguf_planner(
    context: RunContext, gguf: GgufJob, sets: Mapping[str, Rows], calibration: Rows | None
) -> GgufPlanner:
    """Measure every unit that has a choice: embedding and output by running the model, all others by two sweeps."""
    if all(len(kinds) == 1 for kinds in gguf.menu.values()):
        return GgufPlanner(context, gguf, {}, EndRounding())
    assert calibration is not None  # rows are left out where nothing is to be measured
    ends = measure_ends(context, gguf, calibration, sets["scoring"])
    return GgufPlanner(context, gguf, {**_swept(context, gguf, calibration, sets["scoring"]), **ends.scores}, ends)


def _swept(context: RunContext, gguf: GgufJob, calibration: Rows, scoring: Rows) -> UnitScores:
    job, menu = gguf.job, {unit.name: gguf.menu[unit.name] for unit in gguf.job.units}
    if all(len(kinds) == 1 for kinds in menu.values()):
        return {}
    known = context.saved.load(_SCORES)
    if known is not None:
        return scores_of_pairs(known)
    found = measure(
        job.stream(),
        rows_of_measurement(job, calibration, scoring.tokens),
        BlockRounding(job.settings.method, cast(Menu, menu), job.stored_dtypes),
        SweepSettings(job.config.seed),
        context.reporter.progress,
        context.part("measure").saved,
    )
    check_scores(found.scores, found.projections)
    scores = found.scores[job.settings.metric]
    context.saved.save(_SCORES, pairs_of_scores(scores))
    context.part("measure").saved.drop()
    return scores
