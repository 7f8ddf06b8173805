"""Evaluate written folders against the original model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from hawqtool.checkpoint.prefetch import Prefetcher
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.evaluation.divergence import OutputComparison, as_evaluation, standard_error
from hawqtool.evaluation.plan_divergence import Calibration, plan_divergences
from hawqtool.evaluation.rotation_proof import rotation_difference, rotation_kl
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.records import Evaluation, Rows, UnitFormats
from hawqtool.report.schema import RotationCheck
from hawqtool.report.wording import shown_plan
from hawqtool.runtime.malloc import release_freed_pages
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.streaming.converted import WeightSource
from hawqtool.streaming.kept_roundings import ROUNDINGS, KeptRoundings
from hawqtool.streaming.offload import total_bytes
from hawqtool.streaming.stream import ModelStream

_CPU_ROWS = 2
"""Most rows of a pass on a CPU: more are no faster and take more memory."""


_ROTATION_ROWS, _ROTATION_TOKENS = 4, 64
"""Rows on which a rotated original is compared with the original, and tokens of the row that proves the rotation."""

ROTATION = "rotation"
"""Key under which the result of that is saved."""


def check_rotation(context: RunContext, sets: dict[str, Rows]) -> RotationCheck | None:
    """Prove that the rotated original computes what the original does, and measure what storing it costs.

    Args:
        context: The run; its store keeps the result.
        sets: Rows by role; random tokens are used where there are none.

    Returns:
        The record; None where nothing is rotated.

    Raises:
        InputError: If the rotated model computes something else; names the part.
    """
    job, known = context.job, context.saved.load(ROTATION)
    rotation = job.index.rotation
    if rotation is None or known is not None:
        return cast(RotationCheck | None, known)
    context.reporter.say("comparing the rotated original with the original")
    reader = TensorReader(job.index, exact=True, device=job.device)
    exact: WeightSource = Prefetcher(reader, pinned=True) if job.device.type == "cuda" else reader
    original, few = job.unrotated().stream(dtype=torch.float32), _some_rows(job, sets)
    row = few[:1, :_ROTATION_TOKENS]
    difference = rotation_difference(original, job.stream(exact, torch.float32), rotation, row)
    kl = rotation_kl(original, job.stream(dtype=torch.float32), few)
    found = {**rotation.record(), "difference": difference, "kl": kl, "rows": len(few)}
    context.saved.save(ROTATION, found)
    context.reporter.say(f"rotated original: KL {kl:.2g} nats per token from the original")
    return cast(RotationCheck, found)


def _some_rows(job: Job, sets: dict[str, Rows]) -> Tensor:
    """Tokens of a few rows that say something of the model, of the text it is judged by if there is any."""
    role = next((role for role in ("report", "selection", "calibration") if role in sets), None)
    if role is not None:
        return sets[role].tokens[:_ROTATION_ROWS]
    count = job.skeleton.get_output_embeddings().out_features
    return torch.randint(count, (1, _ROTATION_TOKENS), generator=torch.Generator().manual_seed(job.config.seed))


class Evaluator:
    """Compares packed folders with the original on fixed sets of rows; the original is run once.

    Args:
        context: The run; its store keeps what the original gave, where no ranks share the rows.
        sets: Rows by role; all are run together.
        sharing: The job of a rank that does not lead; None for the leader, who has the others do their shares.
    """

    def __init__(self, context: RunContext, sets: dict[str, Rows], sharing: Job | None = None) -> None:
        self.job = job = sharing or context.shared(_begin_along, sets)
        self.context, self.reporter = context, context.reporter
        shares = {role: job.ranks.share(len(rows.tokens)) for role, rows in sets.items()}
        self.sets = {role: replace(rows, tokens=rows.tokens[shares[role]]) for role, rows in sets.items()}
        self.seconds = 0.0
        self.stream = job.unrotated().stream()  # what users have is the reference, not what is rounded
        saved = self._own(context.saved)
        known = saved.load("original-states")
        if known is None:
            walk = saved.part("original-walk")
            self.reference = self.last_states(self.stream, "original", list(sets), walk)
            context.save(saved, "original-states", self.reference, total_bytes(list(self.reference.values())))
            walk.drop()
        else:
            self.reference = {role: states.to(job.device) for role, states in known.items()}

    def _own(self, saved: Saved) -> Saved:
        """Where states of single rows are kept; nowhere where each rank has others."""
        return saved if self.job.ranks.size == 1 else NOTHING_SAVED

    def last_states(
        self, stream: ModelStream, label: str, roles: Sequence[str], saved: Saved = NOTHING_SAVED
    ) -> dict[str, Tensor]:
        """Output of a model's last block on sets of rows by role, ``[rows, positions, width]``, from one walk."""
        start, count = time.perf_counter(), len(self.job.structure.blocks)

        def tell(index: int) -> None:
            self.reporter.progress(f"evaluating {shown_plan(label)}", index + 1, count)

        together = self.job.settings.batch_size
        if self.job.device.type == "cpu":
            together = min(together, _CPU_ROWS)
        states = stream.final_states({role: self.sets[role].tokens for role in roles}, together, tell, saved)
        self.seconds += time.perf_counter() - start
        return states

    def candidate(self, folder: Path) -> ModelStream:
        """The model with the weights of a written folder."""
        return self.job.packed_stream(folder)

    def evaluate(
        self,
        folder: Path | None,
        label: str,
        saved: Saved = NOTHING_SAVED,
        roles: Collection[str] | None = None,
    ) -> dict[str, Evaluation]:
        """Quality of a written folder (None: the original itself) by role.

        Args:
            folder: Packed checkpoint.
            label: Its name in the progress.
            saved: Keeps what is known already; of no use once this has returned.
            roles: Sets of rows to evaluate on (default: all; of the original, which nobody asks for others, `report`).
        """
        stream = self.stream if folder is None else self.candidate(folder)
        wanted = roles or (self.sets if folder is not None else ("report",))
        roles = [role for role in self.sets if role in wanted]
        found = {role: as_evaluation(known) for role in roles if (known := saved.load(role)) is not None}
        left, walk = [role for role in roles if role not in found], saved.part(_WALK)
        if left:
            self.context.ranks.hand_out(_evaluate_along, folder, label, left)
            for role, evaluation in self.compare(stream, label, left, walk):
                found[role] = evaluation
                saved.save(role, vars(evaluation))
            walk.drop()
        self.stream.release_ends()
        return {role: replace(found[role], sources=self.sets[role].sources) for role in roles}

    def compare(
        self, stream: ModelStream, label: str, roles: Sequence[str], saved: Saved = NOTHING_SAVED
    ) -> Iterator[tuple[str, Evaluation]]:
        """Quality of a model on sets of rows, one after the other, by all ranks together."""
        states = self.reference
        if stream is not self.stream:
            states = self.last_states(stream, label, roles, self._own(saved))
        for role in roles:
            release_freed_pages()  # logits need other sizes than blocks do
            start, tokens = time.perf_counter(), self.sets[role].tokens
            comparison = OutputComparison(self.stream, stream, tokens, self.reference[role])
            found = comparison.evaluation(states[role], self.job.ranks)
            self.seconds += time.perf_counter() - start
            yield role, found

    def compare_layerwise(self, calibration: Rows, plans: Mapping[str, UnitFormats]) -> dict[str, Evaluation]:
        """Divergence on the selection rows of plans whose layers are rounded one by one, by all ranks together.

        Args:
            calibration: Rows behind the rounding.
            plans: Formats by unit, by name of the plan.
        """
        count = len(self.job.structure.blocks)
        self.context.ranks.hand_out(_compare_along, calibration, plans)
        found = self.layerwise(calibration, plans, self.reporter.progress)
        sources, positions = self.sets["selection"].sources, self.reference["selection"].shape[1]
        self.reporter.progress(_COMPARING, count, count)
        return {
            name: Evaluation(
                measure="kl" if self.job.task.logits else "embedding_error",
                divergence=float(rows.mean()),
                stderr=standard_error(rows),
                row_divergence=tuple(rows.tolist()),
                num_tokens=len(rows) * positions,
                perplexity=None,
                same_top=None,
                sources=sources,
            )
            for name, rows in found.items()
        }

    def layerwise(
        self,
        calibration: Rows,
        plans: Mapping[str, UnitFormats],
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> dict[str, Tensor]:
        """The divergence of every row by plan, on all ranks."""
        job, tokens = self.job, self.sets["selection"].tokens
        menu = {unit.name: tuple(dict.fromkeys(plan[unit.name] for plan in plans.values())) for unit in job.units}
        comparison = OutputComparison(self.stream, job.stream(), tokens, self.reference["selection"])
        found = plan_divergences(
            comparison,
            Calibration(calibration, job.settings.batch_size, self.context.roundings),
            job.rounding(menu),
            plans,
            partial(progress, _COMPARING),
            job.ranks,
        )
        self.context.roundings.drop()
        self.stream.release_ends()
        return found


_COMPARING, _WALK = "comparing plans", "walk"
_EVALUATOR = "evaluator"


def _begin_along(job: Job, sets: dict[str, Rows]) -> None:
    """A rank's share of the original's states."""
    roundings = job.ranks.kept.get(ROUNDINGS, KeptRoundings())
    job.ranks.kept[_EVALUATOR] = Evaluator(RunContext(job, roundings=roundings), sets, job)


def _evaluate_along(job: Job, folder: Path | None, label: str, roles: Sequence[str]) -> None:
    """A rank's share of an evaluation."""
    evaluator: Evaluator = job.ranks.kept[_EVALUATOR]
    stream = evaluator.stream if folder is None else job.packed_stream(folder)
    for _ in evaluator.compare(stream, label, roles):
        pass
    evaluator.stream.release_ends()


def _compare_along(job: Job, calibration: Rows, plans: Mapping[str, UnitFormats]) -> None:
    """A rank's share of a comparison of plans."""
    job.ranks.kept[_EVALUATOR].layerwise(calibration, plans)
