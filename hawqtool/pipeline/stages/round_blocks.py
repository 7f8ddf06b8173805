"""Walk the blocks of a model in order: round each, refine it where that is asked for, hand on the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.export.stored.weights import packed_parts, unpack_parts
from hawqtool.formats.activations import ActivationFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.stages.refine import BlockRefiner, fitting_rows
from hawqtool.records import BlockSpec, LinearSpec, RoundedLayer, Rows, UnitFormats
from hawqtool.rounding.floats.scale_search import divisor_of_peak
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.layer import quantized, round_layer_groups, round_without_inputs, shares_rows, with_codes
from hawqtool.rounding.learned.block import Schedule
from hawqtool.rounding.learned.gram_matrix import GramSchedule, learn_group
from hawqtool.rounding.method import TaskGroup
from hawqtool.rounding.spec import InitialRounding, InputGroup, InputGroups, RoundingSpec
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.streaming.block import Activations
from hawqtool.streaming.dealt import dealt, rounded_by_rows
from hawqtool.streaming.input_peaks import input_peaks
from hawqtool.streaming.input_statistics import collect_statistics, replay_rounded
from hawqtool.streaming.resume_points import ResumePoints
from hawqtool.streaming.stream import ModelStream


class Sink(Protocol):
    """Takes what rounding changes: `BackgroundWriter`, or something in memory."""

    def write_layer(self, layer: RoundedLayer) -> None:
        """A rounded layer."""

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """New value of a tensor that is not packed, by its name in the checkpoint."""


@dataclass
class Findings:
    """What the report says of rounded blocks.

    Args:
        layers: Metrics by layer.
        refinement: What it changed, by block; empty where it was not asked for.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)

    def add(self, *others: Findings) -> None:
        """Add those of further blocks."""
        for other in others:
            self.layers |= other.layers
            self.refinement |= other.refinement


@dataclass(frozen=True)
class Finished:
    """Leading blocks that an interrupted walk has handed on already.

    Args:
        reader: Of the files with their tensors; None where there are no such blocks.
        findings: A block each.
        states: Keeps hidden states of the walk, which spare walking those blocks again.
        keep: Called after each further block, once the sink has all of it.
    """

    reader: TensorReader | None = None
    findings: Sequence[Findings] = ()
    states: Saved = NOTHING_SAVED
    keep: Callable[[BlockSpec, Findings], None] = lambda *_: None


def round_blocks(
    job: Job,
    formats: UnitFormats,
    rows: Rows,
    sink: Sink,
    progress: Callable[[int, int], None],
    schedule: Schedule | None = None,
    finished: Finished | None = None,
) -> Findings:
    """Round, and where it is asked for refine, every layer on the quantized prefix.

    Args:
        job: The model.
        formats: Formats by unit.
        rows: Rounding rows.
        sink: Takes the result.
        progress: Called with what is done and what there is to do: steps of all blocks, or blocks.
        schedule: Steps and rates of the refinement (default: steps and seed of the configuration).
        finished: Blocks that are left out, or walked with their weights read back where no later states were kept.
    """
    stream, rounding = job.stream(), RoundingSpec.of_plan(job.settings.method, formats, job.stored_dtypes)
    stream.input_formats = _input_formats(job, formats, stream, rows)
    divisors = {name: kind.divisor for name, kind in stream.input_formats.items() if kind.divisor is not None}
    rounding = replace(rounding, output_moments=rows.output_moments, input_divisors=divisors)
    schedule = schedule or Schedule(job.config.refine_steps, job.config.seed, learner=job.config.refine_learner)
    if job.config.distill_steps and not schedule.steps:
        rows = fitting_rows(rows)  # on rows that rounding saw, distillation's steps would look like losses
    refiner = BlockRefiner(job, stream, rows, schedule) if schedule.steps else None
    finished = finished or Finished()
    activations = refiner.walked if refiner else _walked(job, stream, rows)
    findings, blocks, steps = Findings(), job.structure.blocks, max(schedule.steps, 1)

    def tell(index: int, step: int) -> None:
        progress(index * steps + step, len(blocks) * steps)

    carried, resume_points = refiner or activations, ResumePoints(finished.states, job.device)
    first = resume_points.restore(carried.states, len(finished.findings))
    findings.add(*finished.findings[:first])
    for spec in blocks[first:]:
        with stream.block(spec.index) as block:
            rounder = _BlockRounder(job, rounding, block, sink, refiner)
            if spec.index < len(finished.findings):
                known = finished.findings[spec.index]
                rounder.walk_again(activations, finished.reader, bool(known.refinement))
                findings.add(known)
            else:
                rounder.walk(activations, partial(tell, spec.index))
                findings.add(latest := rounder.hand_on())
                finished.keep(spec, latest)
                resume_points.keep(spec.index + 1, carried.states)
        tell(spec.index, steps)
    if stream.head:
        if refiner:
            refiner.share_original()
        fitted = refiner.fitting if refiner else rows.tokens[job.ranks.share(len(rows.tokens))]
        statistics = stream.head_statistics(fitted, activations)
        rounder = _BlockRounder(job, rounding, stream.head, sink)
        rounder.visit([(stream.head.spec.input_groups[0], statistics)])
        findings.add(rounder.hand_on())
    return findings


def _input_formats(job: Job, formats: UnitFormats, stream: ModelStream, rows: Rows) -> dict[str, ActivationFormat]:
    """How engines round the inputs of linears, for those where they do, with divisors that these rows give."""
    found = {unit: fmt.activation_format for unit, fmt in formats.items()}
    by_unit = {unit: activations for unit, activations in found.items() if activations is not None}
    divided = {unit for unit, activations in by_unit.items() if activations.has_divisor}
    if divided:
        peaks = input_peaks(stream, rows.tokens, job.settings.batch_size, divided, job.ranks)
        by_unit |= {unit: replace(by_unit[unit], divisor=divisor_of_peak(peak)) for unit, peak in peaks.items()}
    return {m.name: by_unit[unit.name] for unit in job.units for m in unit.members if unit.name in by_unit}


def round_weights(
    job: Job,
    formats: UnitFormats,
    sink: Sink,
    progress: Callable[[int, int], None],
    finished: Finished | None = None,
) -> Findings:
    """Round every layer to nearest by itself, with no rows and no forward pass.

    Args:
        job: The model; its method is plain rounding.
        formats: Formats by unit.
        sink: Takes the result.
        progress: Called with blocks that are done and all blocks.
        finished: Blocks that are left out.
    """
    stream, rounding = job.stream(), RoundingSpec.of_plan(job.settings.method, formats, job.stored_dtypes)
    stream.release_ends()
    finished, findings, blocks = finished or Finished(), Findings(), job.structure.blocks
    findings.add(*finished.findings)
    for spec in blocks[len(finished.findings) :]:
        with stream.block(spec.index) as block:
            findings.add(latest := _rounded_alone(rounding, block, sink))
        finished.keep(spec, latest)
        progress(spec.index + 1, len(blocks))
    if stream.head:
        findings.add(_rounded_alone(rounding, stream.head, sink))
    return findings


def _rounded_alone(rounding: RoundingSpec, block: LoadedBlock, sink: Sink) -> Findings:
    found = Findings()
    for group in block.spec.input_groups:
        for layer in round_without_inputs(rounding.tasks(block, group), rounding.method):
            sink.write_layer(layer)
            found.layers[layer.name] = asdict(layer.metrics) | {"format": layer.quant_format.label, "fallback": None}
    return found


def _walked(job: Job, stream: ModelStream, rows: Rows) -> Activations:
    """Hidden states of all rows before the first block, with what the method wants to know of them."""
    needs = job.holds_out_tokens, job.settings.method.needs_drift
    share = job.ranks.share(len(rows.tokens))
    activations = stream.embed(rows.tokens[share], job.settings.batch_size, *needs, rows.importance)
    activations.ranks, activations.first_row = job.ranks, share.start
    # A share that is known asks for no more. A CPU spends its time on column loops.
    method = job.settings.method
    activations.at_outputs = job.device.type == "cuda" and method.name != "gptaq" and not job.holds_out_tokens
    stream.release_ends()
    return activations


_Rounded = tuple[RoundedLayer, dict[str, Any]]
"""A layer, and what the report says of its tokens."""


class _BlockRounder:
    """Rounds the input groups of one block, refines it where that is asked for, and hands the result on.

    Args:
        job: The model.
        rounding: Method, and one format for every unit that is rounded.
        block: The block, which still has the original's weights; its linears get the rounded ones.
        sink: Takes the result.
        refiner: Refines the block; None where rounding is final, as an output head's is.
    """

    def __init__(
        self, job: Job, rounding: RoundingSpec, block: LoadedBlock, sink: Sink, refiner: BlockRefiner | None = None
    ) -> None:
        self.job, self.rounding, self.block, self.sink, self.refiner = (
            job,
            rounding.on_block(block),
            block,
            sink,
            refiner,
        )
        self.findings = Findings()
        self.waiting: dict[str, RoundedLayer] = {}
        self.initial: list[InitialRounding] = []
        self.tokens: dict[str, dict[str, Any]] = {}
        self.changed: dict[str, Tensor] = {}

    def walk(self, activations: Activations, progress: Callable[[int], None]) -> None:
        """Round and refine the block; the hidden states become its outputs."""
        if self.refiner:
            self.refiner.begin(self.block)
        collect_statistics(self.block, activations, self.visit)
        if self.refiner:
            if self.initial:
                self._refine(self.refiner, progress)
            self.refiner.advance(self.block)

    def walk_again(self, activations: Activations, reader: TensorReader | None, refined: bool) -> None:
        """Go over a block whose tensors were handed on before; the hidden states become its outputs, to the bit."""
        assert reader is not None  # otherwise no block is finished
        if self.refiner is None:
            replay_rounded(self.block, activations, partial(self._read_back, reader))
            return
        self.refiner.begin(self.block)
        self._read_back(reader)
        if refined:
            self.refiner.put_gains(self.block, reader)
        self.refiner.advance(self.block)

    def visit(self, groups: InputGroups) -> None:
        """Round the planned layers of some groups and replace their weights.

        What nothing refines is final and goes to the sink at once, which may write it while the next group is rounded.
        """
        for group, rounded in dealt(self.job.ranks, groups, self._rounded, self.rounding.parts, self._by_rows):
            linears = {linear.name: linear for linear in group}
            for layer, tokens in rounded:
                self.tokens[layer.name] = tokens
                if self.refiner:
                    self.waiting[layer.name] = layer
                    # A copy: on a CPU this is the block's own weight, which is about to be replaced.
                    original = self.block.weight(linears[layer.name])
                    original = original.to(self.rounding.stored_dtypes[layer.name], copy=True)
                    self.initial.append(InitialRounding(layer.name, original, quantized(layer), layer.quant_format))
                else:
                    self._give(layer)
                self._put(linears[layer.name], quantized(layer))

    def _by_rows(self, group: Sequence[LinearSpec]) -> Callable[[InputGroup], list[_Rounded]] | None:
        """What rounds a group on all ranks together, a share of rows each; None where rows depend on each other."""
        moments = self.rounding.output_moments.get(group[0].name)
        formats = [fmt for linear in group for fmt in self.rounding.formats_of(linear)]
        hear = moments is not None and moments.lower is not None
        if hear or self.job.holds_out_tokens or any(map(shares_rows, formats)) or is_expert(group[0].name):
            return None
        few = min(linear.out_features for linear in group) < self.job.ranks.size
        return None if few else lambda one: self._rounded([one], shared=True)[0]

    def _rounded(self, part: Sequence[InputGroup], shared: bool = False) -> list[list[_Rounded]]:
        """The planned layers of each of some groups, each with what the report says of its tokens.

        Args:
            part: The groups, with statistics of all rows.
            shared: Whether all ranks round the one group, each some rows of its layers.
        """
        method, recorder = self.rounding.method, self.job.recorder
        with recorder.stage("factor"):
            groups = self.rounding.task_groups(self.block, part)
        wanted = [group for group in groups if group]
        # Who has moments is alone with its Gram matrix, and no expert.
        moments = self.rounding.output_moments.get(part[0][0][0].name)
        rounded = partial(round_layer_groups, method=method, recorder=recorder, moments=moments)
        if shared and wanted:
            found = iter([rounded_by_rows(self.job.ranks, wanted[0], lambda own: rounded([own])[0])])
        else:
            found = iter(rounded(wanted) if wanted else ())
        return [
            self._learned(group, statistics, next(found)) if group else []
            for group, (_, statistics) in zip(groups, part, strict=True)
        ]

    def _learned(self, group: TaskGroup, statistics: GroupStatistics, layers: list[RoundedLayer]) -> list[_Rounded]:
        """Layers after learning on their Gram matrix, where that is asked for."""
        if self.job.config.gram_steps:
            schedule = GramSchedule(self.job.config.gram_steps, self.job.config.seed)
            with self.job.recorder.stage("gram learning"):
                layers = learn_group(group.tasks, layers, statistics, group.factor, self.rounding.method, schedule)
        tokens = {"num_tokens": statistics.num_routed, "fallback": _fallback(statistics, self.job)}
        return [(layer, tokens) for layer in layers]

    def hand_on(self) -> Findings:
        """Give the sink what it has not got yet of what came of the block."""
        for layer in self.waiting.values():
            self._give(layer)
        for name, tensor in self.changed.items():
            self.sink.write_changed(name, tensor)
        return self.findings

    def _give(self, layer: RoundedLayer) -> None:
        layer = replace(layer, input_divisor=self.rounding.input_divisors.get(layer.name))
        with self.job.recorder.stage("write"):
            self.sink.write_layer(layer)
        values = asdict(layer.metrics) | {"format": layer.quant_format.label}
        self.findings.layers[layer.name] = values | self.tokens[layer.name]

    def _put(self, linear: LinearSpec, value: Quantized) -> None:
        with self.job.recorder.stage("dequantize"):
            self.block.set_weight(linear, dequantize(*value))

    def _refine(self, refiner: BlockRefiner, progress: Callable[[int], None]) -> None:
        refined = refiner.finish(self.block, self.initial, progress)
        linears = {linear.name: linear for linear in self.block.spec.linears}
        for layer in self.initial:
            value = refined.result.layers[layer.name]
            self._put(linears[layer.name], value)
            self.waiting[layer.name] = with_codes(self.waiting[layer.name], value, layer.weight)
        self.changed = refined.tensors
        self.findings.refinement[self.block.spec.name] = refined.record

    def _read_back(self, reader: TensorReader) -> None:
        """Put the block's rounded weights in place."""
        for linear in self.block.spec.linears:
            for quant_format in self.rounding.formats_of(linear):
                shape = linear.out_features, linear.in_features
                parts = {suffix: part.to(self.job.device) for suffix, part in packed_parts(reader, linear.name).items()}
                self._put(linear, unpack_parts(parts, quant_format, shape))


def _fallback(statistics: GroupStatistics, job: Job) -> str | None:
    """What replaced tokens that an expert lacked, and settings that could not be chosen without them."""
    lent = statistics.num_tokens - statistics.num_routed
    reasons = [f"statistics with {lent} tokens that were routed to other experts"] if lent else []
    if job.holds_out_tokens and statistics.fitting is None:
        reasons.append("rounded as gptq, for no held-out tokens or no others came here to choose settings on")
    return "; ".join(reasons) or None
