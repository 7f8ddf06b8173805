"""Plans against each other before one is carried out, by models whose layers are rounded one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from hawqtool.evaluation.divergence import as_evaluation
from hawqtool.evaluation.paired import PairedDifference, balanced_divergence, compare_paired
from hawqtool.pipeline.search.trials import TrialRunner, formats_key
from hawqtool.pipeline.stages.measure import measuring_rows
from hawqtool.records import BitPlan, Evaluation
from hawqtool.report.plan_comparison import UnroundedRival
from hawqtool.runtime.stage_timer import Stopwatch

FARTHEST = 1.0
"""Divergence up to which the order of mixed plans is that of plans that are carried out, in nats.

At 2.5 bits of Qwen2.5-Coder-0.5B it put the rule that people use 70 % above uniform, below which that is by 35 % when
both are carried out.
"""

_COMPARISON = "layerwise"


@dataclass(frozen=True)
class LayerwiseProof:
    """What plans are on the selection rows, each as a model whose layers are rounded one by one.

    Args:
        plans: Mixed plans by name, the configured metric's own first, and the uniform one where there is one.
        quality: Divergence of each.
        uniform: Name of the uniform one; None where none fits the budget.
    """

    plans: Mapping[str, BitPlan]
    quality: Mapping[str, Evaluation]
    uniform: str | None

    @property
    def tried(self) -> int:
        """Mixed plans that were compared."""
        return len(self.plans) - (self.uniform is not None)

    @property
    def best(self) -> str:
        """The mixed plan of least divergence, every source of rows counting alike."""
        mixed = [name for name in self.plans if name != self.uniform]
        return min(mixed, key=lambda name: balanced_divergence(self.quality[name]))

    @property
    def doubts(self) -> bool:
        """Whether another plan than the metric's own is the best, and all are too far from the original to tell."""
        return self.best != next(iter(self.plans)) and balanced_divergence(self.quality[self.best]) > FARTHEST

    def minus_uniform(self, name: str) -> PairedDifference | None:
        """A mixed plan less the uniform one; None where there is none."""
        return None if self.uniform is None else compare_paired(self.quality[name], self.quality[self.uniform])

    def rivals(self, shipped: str, carried_out: Collection[str]) -> dict[str, UnroundedRival]:
        """What the report says of plans that were not carried out, as they compare with the shipped one."""
        found: dict[str, UnroundedRival] = {}
        for name, plan in self.plans.items():
            if name in carried_out:
                continue
            less = compare_paired(self.quality[name], self.quality[shipped])
            found[name] = {
                "formats": sorted({fmt.label for fmt in plan.formats.values()}),
                "stored_bytes": plan.stored_bytes,
                "bpw_linears": plan.bpw,
                "minus_shipped": {"difference": less.value, "stderr": less.stderr},
            }
        return found


def compare_layerwise(
    runner: TrialRunner, mixed: Mapping[str, BitPlan], uniform: tuple[str, BitPlan] | None
) -> LayerwiseProof:
    """Compare plans of one budget; a run that resumes knows the result.

    Args:
        runner: Its evaluator has the selection rows, its sets the calibration rows.
        mixed: Mixed plans by name.
        uniform: The best uniform plan that fits, by name.
    """
    plans = {**mixed, **dict([uniform] if uniform else [])}
    saved = runner.context.saved.part(_COMPARISON)
    key = "-".join(formats_key(plan.formats) for plan in plans.values())
    known = saved.load(key)
    if known is None:
        assert runner.evaluator is not None  # what compares nothing is not asked for this
        with Stopwatch(runner.timings, "compare plans"):
            formats = {name: plan.formats for name, plan in plans.items()}
            rows = measuring_rows(runner.context.job, runner.sets["calibration"])
            rows = replace(rows, output_moments={})  # output feedback has no part in this
            found = runner.evaluator.compare_layerwise(rows, formats)
        known = {name: vars(quality) for name, quality in found.items()}
        saved.save(key, known)
        runner.timings.save()
    quality = {name: as_evaluation(values) for name, values in known.items()}
    return LayerwiseProof(plans, quality, None if uniform is None else uniform[0])
