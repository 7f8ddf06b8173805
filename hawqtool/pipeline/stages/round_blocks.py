"""Walk the blocks of a model in order: round each, refine it where that is asked for, hand on the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from hawqtool.checkpoint.reader import TensorReader
from hawqtool.export.packed_reader import packed_parts, unpack_parts
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.stages.refine import BlockRefiner, split_rows
from hawqtool.records import BlockSpec, LinearSpec, RoundedLayer, Rows, UnitFormats
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.layer import quantized, round_layers, with_codes
from hawqtool.rounding.learned.block import Schedule
from hawqtool.rounding.learned.fake_quant import InitialRounding
from hawqtool.rounding.method import RoundingMethod, Task
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.runtime.reporter import Reporter
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.streaming.block import Activations, read_weight, replace_weight
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
    """

    reader: TensorReader | None = None
    findings: Sequence[Findings] = ()
    states: Saved = NOTHING_SAVED


def round_blocks(
    job: Job,
    formats: UnitFormats,
    rows: Rows,
    sink: Sink,
    reporter: Reporter,
    label: str,
    schedule: Schedule | None = None,
    finished: Finished | None = None,
    keep: Callable[[BlockSpec, Findings], None] = lambda *_: None,
) -> Findings:
    """Round, and where it is asked for refine, every layer on the quantized prefix.

    Args:
        job: The model.
        formats: Formats by unit.
        rows: Rounding rows.
        sink: Takes the result.
        reporter: Progress.
        label: Name of the plan in the progress.
        schedule: Steps and rates of the refinement (default: steps and seed of the configuration).
        finished: Blocks that are left out, or walked with their weights read back where no later states were kept.
        keep: Called after each block that was rounded, once the sink has all of it.
    """
    stream = job.stream()
    schedule = schedule or Schedule(job.config.refine_steps, job.config.seed)
    refiner = BlockRefiner(job, stream, rows, schedule) if schedule.steps else None
    finished = finished or Finished()
    activations = refiner.walked if refiner else _walked(job, stream, rows)
    walker = _Walker(job, job.layer_formats(formats), refiner, sink)
    found, blocks, steps = Findings(), job.structure.blocks, max(schedule.steps, 1)
    stage = f"rounding and refining {label}" if refiner else f"rounding {label}"

    def tell(index: int, step: int) -> None:
        reporter.progress(stage, index * steps + step, len(blocks) * steps)

    carried, resume_points = refiner or activations, ResumePoints(finished.states, job.device)
    first = resume_points.restore(carried.states, len(finished.findings))
    found.add(*finished.findings[:first])
    for spec in blocks[first:]:
        with stream.block(spec.index) as block:
            walker.enter(block, spec)
            if spec.index < len(finished.findings):
                known = finished.findings[spec.index]
                walker.walk_again(activations, finished.reader, bool(known.refinement))
                found.add(known)
            else:
                walker.walk(activations, partial(tell, spec.index))
                found.add(latest := walker.hand_on())
                keep(spec, latest)
                resume_points.keep(spec.index + 1, carried.states)
        tell(spec.index, steps)
    if job.structure.head:
        walker.enter(stream.model, job.structure.head)
        if refiner:
            refiner.share_original()
        statistics = stream.head_statistics(split_rows(rows.tokens)[0] if refiner else rows.tokens, activations)
        walker.visit(job.structure.head.input_groups[0], statistics)
        found.add(walker.hand_on())
    return found


def _walked(job: Job, stream: ModelStream, rows: Rows) -> Activations:
    """Hidden states of all rows before the first block, with what the method wants to know of them."""
    needs = job.method.needs_held_out, job.method.needs_drift
    activations = stream.embed(rows.tokens, job.batch_size, *needs, rows.weights)
    stream.release_ends()
    return activations


class _Walker:
    """Rounds each input group of the current block and puts the result in place."""

    def __init__(self, job: Job, formats: UnitFormats, refiner: BlockRefiner | None, sink: Sink) -> None:
        self.job, self.formats, self.refiner, self.sink = job, formats, refiner, sink
        self.dtypes = job.stored_dtypes
        self.block: Any = None
        self.spec: Any = None
        self.layers: dict[str, RoundedLayer] = {}
        self.seen: dict[str, dict[str, Any]] = {}
        self.metrics: dict[str, Any] = {}
        self.starts: list[tuple[LinearSpec, InitialRounding]] = []
        self.changed: dict[str, Tensor] = {}
        self.refined: dict[str, Any] = {}

    def enter(self, block: nn.Module, spec: BlockSpec) -> None:
        """Go to a block, which still has the original's weights."""
        self.block, self.spec = block, spec
        self.layers, self.seen, self.metrics = {}, {}, {}
        self.starts, self.changed, self.refined = [], {}, {}

    def walk(self, activations: Activations, progress: Callable[[int], None]) -> None:
        """Round and refine the block; the hidden states become its outputs."""
        if self.refiner:
            self.refiner.begin(self.block, self.spec)
        collect_statistics(self.block, self.spec, activations, self.visit)
        if self.refiner:
            if self.starts:
                self._refine(self.refiner, progress)
            self.refiner.advance(self.block, self.spec)

    def walk_again(self, activations: Activations, reader: TensorReader | None, refined: bool) -> None:
        """Go over a block whose tensors were handed on before; the hidden states become its outputs, to the bit."""
        assert reader is not None  # otherwise no block is finished
        if self.refiner is None:
            replay_rounded(self.block, self.spec, activations, partial(self._read_back, reader))
            return
        self.refiner.begin(self.block, self.spec)
        self._read_back(reader)
        if refined:
            self.refiner.put_gains(self.block, self.spec, reader)
        self.refiner.advance(self.block, self.spec)

    def visit(self, group: Sequence[LinearSpec], statistics: GroupStatistics) -> None:
        """Round the planned layers of a group and replace their weights.

        What nothing refines is final and goes to the sink at once, which may write it while the next group is rounded.
        """
        planned = {linear.name: linear for linear in group if linear.name in self.formats}
        if not planned:
            return
        tasks = [
            Task(name, read_weight(self.block, self.spec, linear), self.formats[name], self.dtypes[name])
            for name, linear in planned.items()
        ]
        method, recorder = self.job.method, self.job.recorder
        with recorder.stage("factor"):
            factor = factorize(statistics.gram, statistics.num_tokens, method.damping, name=tasks[0].name)
        for task, layer in zip(tasks, round_layers(tasks, statistics, factor, method, recorder), strict=True):
            fallback = _fallback(statistics, method)
            self.seen[layer.name] = {"num_tokens": statistics.num_routed, "fallback": fallback}
            if self.refiner and self.spec is not self.job.structure.head:
                self.layers[layer.name] = layer
                # A copy: on a CPU the task holds the block's own weight, which is about to be replaced.
                original = task.weight.to(task.stored_dtype, copy=True)
                start = InitialRounding(layer.name, original, quantized(layer), layer.quant_format)
                self.starts.append((planned[layer.name], start))
            else:
                self._give(layer)
            self._put(planned[layer.name], quantized(layer))

    def hand_on(self) -> Findings:
        """Give the sink what it has not got yet of what came of the block."""
        for layer in self.layers.values():
            self._give(layer)
        for name, tensor in self.changed.items():
            self.sink.write_changed(name, tensor)
        return Findings(self.metrics, self.refined)

    def _give(self, layer: RoundedLayer) -> None:
        with self.job.recorder.stage("write"):
            self.sink.write_layer(layer)
        values = asdict(layer.metrics) | {"format": layer.quant_format.label}
        self.metrics[layer.name] = values | self.seen[layer.name]

    def _put(self, linear: LinearSpec, value: Quantized) -> None:
        with self.job.recorder.stage("dequantize"):
            replace_weight(self.block, self.spec, linear, dequantize(*value))

    def _refine(self, refiner: BlockRefiner, progress: Callable[[int], None]) -> None:
        found = refiner.finish(self.block, self.spec, self.starts, progress)
        for linear, start in self.starts:
            value = found.result.layers[linear.name]
            self._put(linear, value)
            self.layers[linear.name] = with_codes(self.layers[linear.name], value, start.weight)
        self.changed, self.refined = found.tensors, {self.spec.name: found.record}

    def _read_back(self, reader: TensorReader) -> None:
        """Put the block's rounded weights in place."""
        for linear in (linear for linear in self.spec.linears if linear.name in self.formats):
            shape = linear.out_features, linear.in_features
            parts = packed_parts(reader, linear.name)
            codes, scales, zeros = unpack_parts(parts, self.formats[linear.name], shape)
            device = self.job.device
            value = Quantized(codes.to(device), scales.to(device), None if zeros is None else zeros.to(device))
            self._put(linear, value)


def _fallback(statistics: GroupStatistics, method: RoundingMethod) -> str | None:
    """What replaced tokens that an expert lacked, and settings that could not be chosen without them."""
    lent = statistics.num_tokens - statistics.num_routed
    found = [f"statistics with {lent} tokens that were routed to other experts"] if lent else []
    if method.needs_held_out and statistics.fitting is None:
        found.append("rounded as gptq, for no held-out tokens or no others came here to choose settings on")
    return "; ".join(found) or None
