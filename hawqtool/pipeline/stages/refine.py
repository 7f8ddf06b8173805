"""Refine the blocks of a model while it is rounded, each towards the original's output of the same block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import UsageError
from hawqtool.export.tensor_checks import is_gain
from hawqtool.model.block import BlockCall, LoadedBlock
from hawqtool.model.kept import is_norm
from hawqtool.pipeline.run.job import Job
from hawqtool.records import Rows
from hawqtool.rounding.learned.block import Batches, OutputMetric, Refined, Schedule, damped_metric, refine
from hawqtool.rounding.output_feedback import unpack_lower
from hawqtool.rounding.spec import InitialRounding, InitialRoundings
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.resume_points import States
from hawqtool.streaming.stream import ModelStream

BATCH_ROWS = {"cpu": 4, "cuda": 8}
"""Rows of one step; fixed per kind of device, because they change what is learned."""

TRAINING_HELD_OUT_EVERY = 8
"""One row of so many is held out: neither rounding nor learning sees it, and it judges what was learned."""


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to round and learn from, and held-out rows.

    Raises:
        UsageError: If there are fewer than two.
    """
    if len(rows) < 2:
        raise UsageError(
            "--refine-steps, --sensitivity-steps and --distill-steps hold calibration rows out and need at least 2, "
            "found 1; raise --num-samples"
        )
    held = is_held_out(len(rows)).to(rows.device)
    return rows[~held], rows[held]


def is_held_out(count: int) -> Tensor:
    """Which of so many rows are held out, ``[rows]`` bool: odd and even ones in turns, as two sources alternate."""
    row = torch.arange(count)
    last = min(TRAINING_HELD_OUT_EVERY, count) - 1
    return row % TRAINING_HELD_OUT_EVERY == last - row // TRAINING_HELD_OUT_EVERY % 2


def fitting_rows(rows: Rows) -> Rows:
    """Calibration rows without those that are held out, and the importance of their tokens."""
    fitting = ~is_held_out(len(rows.tokens))
    importance = None if rows.importance is None else {name: part[fitting] for name, part in rows.importance.items()}
    return replace(rows, tokens=split_rows(rows.tokens)[0], importance=importance)


def can_share(rows: Tensor, ranks: Ranks) -> bool:
    """Whether ranks can share rows in learning: each needs some that are held out."""
    return ranks.size <= len(split_rows(rows)[1])


def batch_sizes(count: int, together: int, ranks: Ranks = ALONE) -> list[int]:
    """Rows of this rank in each batch of ``count`` rows, of which it has a consecutive share; as many batches in all.

    Args:
        count: Rows of all ranks.
        together: Rows of a batch, those of all ranks.
        ranks: The processes.
    """
    if ranks.size == 1:
        return [min(together, count - first) for first in range(0, count, together)]
    share, batches = ranks.share(count), min(-(-count // together), count // ranks.size)
    own = share.stop - share.start
    return [own * (number + 1) // batches - own * number // batches for number in range(batches)]


def embedded(stream: ModelStream, rows: Tensor, sizes: Sequence[int]) -> Activations:
    """Hidden states before the first block, in batches of such sizes."""
    parts = [stream.embed(part, len(part)) for part in rows.split(list(sizes))]
    return Activations([part.hidden[0] for part in parts], [part.calls[0] for part in parts])


def weighted_blocks(job: Job) -> frozenset[str]:
    """Blocks that are refined by what the error of their output costs the loss."""
    wanted = job.config.refine_steps and job.settings.refine_error == "loss"
    return frozenset(spec.name for spec in job.structure.blocks) if wanted else frozenset()


@dataclass(frozen=True)
class RefinedBlock:
    """A refined block: what `refine` gave, and its changed norm gains by the name of their tensor."""

    result: Refined
    tensors: dict[str, Tensor]

    @property
    def record(self) -> dict[str, Any]:
        """What the report says of it."""
        return self.result.log.record | {"seconds": self.result.seconds}


class BlockRefiner:
    """Walks the original beside the rounded model and refines each block between the two.

    Args:
        job: The model.
        stream: Stream of the model that is rounded.
        rows: Rounding rows, which the job's ranks share.
        schedule: Steps and rates.

    Attributes:
        walked: Hidden states of the rows that are rounded on; the caller walks them.
        fitting: Tokens of these rows.
    """

    def __init__(self, job: Job, stream: ModelStream, rows: Rows, schedule: Schedule) -> None:
        self.schedule = schedule
        self.job, self.batch_rows = job, BATCH_ROWS[job.device.type]
        self.fitting, held_out, self.sizes = self._own(rows.tokens)
        importance = fitting_rows(rows).importance
        self.walked = stream.embed(self.fitting, job.settings.batch_size, job.holds_out_tokens, importance=importance)
        self.walked.ranks = job.ranks
        self.walked.first_row = job.ranks.share(len(split_rows(rows.tokens)[0])).start
        self.held_out = stream.embed(held_out, self.batch_rows)
        batches = embedded(stream, self.fitting, self.sizes)
        self.calls = [*batches.calls, *self.held_out.calls]
        self.original = Activations([*batches.hidden, *self.held_out.hidden], self.calls)
        self.count = len(batches.hidden)
        self.inputs: list[Tensor] = []
        self.importance, self.moments = rows.importance or {}, rows.output_moments

    def _own(self, values: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """This rank's fitting and held-out rows of what has a row for each, and sizes of the batches of the first."""
        ranks, (fitting, held_out) = self.job.ranks, split_rows(values)
        sizes = batch_sizes(len(fitting), self.batch_rows, ranks)
        return fitting[ranks.share(len(fitting))], held_out[ranks.share(len(held_out))], sizes

    @property
    def states(self) -> States:
        """All hidden states that are carried from block to block, by name."""
        return {
            "walked": self.walked.hidden,
            "held_out": self.held_out.hidden,
            "original": self.original.hidden,
        }

    def begin(self, block: LoadedBlock) -> None:
        """Take the original's outputs of a block, whose weights are still the original's."""
        self.inputs = [*torch.cat(list(self.walked.hidden)).split(self.sizes), *self.held_out.hidden]
        self.share_original()
        advance(block, self.original)

    def finish(
        self,
        block: LoadedBlock,
        initial: Sequence[InitialRounding],
        progress: Callable[[int], None],
    ) -> RefinedBlock:
        """Refine a rounded block, put the result in its place, and run it.

        Args:
            block: The block, holding the rounded weights.
            initial: Its rounded layers.
            progress: Called with the number of steps done.
        """
        gains = norm_gains(self.job, block)
        targets = self.original.hidden
        fitting, held_out = self._metrics(block.spec.name)
        result = refine(
            initial,
            {name: (block.module.get_parameter(name).detach(), dtype) for name, (_, dtype) in gains.items()},
            BlockForward(block, self.calls),
            Batches(self.inputs[: self.count], targets[: self.count], fitting, self.job.ranks),
            Batches(self.inputs[self.count :], targets[self.count :], held_out, self.job.ranks),
            self.schedule,
            progress,
        )
        with torch.no_grad():
            for name, gain in result.gains.items():
                block.module.get_parameter(name).copy_(gain)
        return RefinedBlock(result, {gains[name][0]: gain for name, gain in result.gains.items()})

    def _metrics(self, name: str) -> tuple[OutputMetric | None, OutputMetric | None]:
        """What errors at a block's output count by, in the fitting and in the held-out rows; None where all alike."""
        if name not in weighted_blocks(self.job):
            return None, None
        lower = self.moments[name].lower
        assert lower is not None  # those of blocks always have one
        across = damped_metric(unpack_lower(lower, self.job.device), self.schedule.damping)
        fitting, held_out, sizes = self._own(self.importance[name].to(self.job.device))
        return OutputMetric(across, fitting.split(sizes)), OutputMetric(across, held_out.split(self.batch_rows))

    def put_gains(self, block: LoadedBlock, reader: TensorReader) -> None:
        """Put gains in place that were learned before, from where they were written."""
        with torch.no_grad():
            for name, (stored, _) in norm_gains(self.job, block).items():
                block.module.get_parameter(name).copy_(reader.tensor(stored))

    def advance(self, block: LoadedBlock) -> None:
        """Outputs of the block as it is now, which later blocks are rounded and refined on."""
        outputs = Activations(self.inputs, self.calls)
        advance(block, outputs)
        self.walked.hidden = list(torch.cat(list(outputs.hidden[: self.count])).split(self.job.settings.batch_size))
        self.held_out.hidden = outputs.hidden[self.count :]
        self.inputs = []

    def share_original(self) -> None:
        """Show rounding the original's hidden states, where it wants to see them."""
        if self.job.settings.method.needs_drift:
            fitting = torch.cat(list(self.original.hidden[: self.count]))
            self.walked.original = list(fitting.split(self.job.settings.batch_size))


class FormatRefiner:
    """Refines the roundings of an original block, all layers of one format together, for scores that presume it.

    Norm gains stay, and the block's inputs are the original's. The held-out rows, which say when to stop, are in no
    other part of the measurement: the roundings to begin with must come of `fitting_rows` alone.

    Args:
        job: The model.
        stream: Its stream; the held-out rows walk through it once.
        rows: Calibration rows, `split_rows` of which are learned from and held out.
        schedule: Steps and rates.
    """

    def __init__(self, job: Job, stream: ModelStream, rows: Tensor, schedule: Schedule) -> None:
        self.schedule, self.batch_rows = schedule, BATCH_ROWS[job.device.type]
        fitting, held_out = (stream.embed(part, self.batch_rows) for part in split_rows(rows))
        self.calls, self.count = [*fitting.calls, *held_out.calls], len(fitting.hidden)
        self.held_out: list[MutableSequence[Tensor]] = []
        for spec in job.structure.blocks:
            self.held_out.append(copy(held_out.hidden))
            if spec.index + 1 < len(job.structure.blocks):
                with stream.block(spec.index) as block:
                    advance(block, held_out)

    def __call__(self, block: LoadedBlock, hidden: Sequence[Tensor], initial: InitialRoundings) -> InitialRoundings:
        """Refined roundings; see `hawqtool.rounding.spec.Refiner`. ``hidden`` is that of the fitting rows."""
        inputs = [*torch.cat(list(hidden)).split(self.batch_rows), *self.held_out[block.spec.index]]
        outputs = Activations(list(inputs), self.calls)
        advance(block, outputs)
        fitting = Batches(inputs[: self.count], outputs.hidden[: self.count])
        held_out = Batches(inputs[self.count :], outputs.hidden[self.count :])
        refined: InitialRoundings = {name: dict(by_label) for name, by_label in initial.items()}
        for label in sorted({label for by_label in initial.values() for label in by_label}):
            layers = [by_label[label] for by_label in initial.values() if label in by_label]
            result = refine(layers, {}, BlockForward(block, self.calls), fitting, held_out, self.schedule)
            for layer in layers:
                refined[layer.name][label] = replace(layer, rounded=result.layers[layer.name])
        return refined


@dataclass(frozen=True)
class BlockForward:
    """Runs a block with other weights; names are those of linears, or of the block's own parameters."""

    block: LoadedBlock
    calls: Sequence[Sequence[BlockCall]]

    def __call__(self, weights: Mapping[str, Tensor], hidden: Tensor, batch: int) -> Tensor:
        """Output for the hidden states of a batch, whose number says which other arguments the call has."""
        with self.block.with_weights(weights):
            return self.block.run(hidden, self.calls[batch][self.block.spec.index])


def norm_gains(job: Job, block: LoadedBlock) -> dict[str, tuple[str, torch.dtype]]:
    """Norm gains by name inside the block: name and dtype of the stored tensor."""
    gains = {}
    for path, module in block.module.named_modules():
        full = f"{block.spec.name}.{path}.weight"
        stored = job.structure.stored_names.get(full, full)
        if is_norm(module) and isinstance(getattr(module, "weight", None), nn.Parameter) and is_gain(stored):
            gains[f"{path}.weight"] = (stored, torch_dtype(job.index.tensors[stored].dtype))
    return gains
