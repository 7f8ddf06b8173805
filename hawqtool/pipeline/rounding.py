"""Round a model by plan and write it, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hawqtool.export.compressed_tensors import quantization_config
from hawqtool.export.writer import CheckpointWriter, write_config
from hawqtool.formats import QuantFormat
from hawqtool.model.statistics import GroupStatistics
from hawqtool.model.sweep import Activations, ModelStream, read_weight, replace_weight, visit_groups
from hawqtool.model.units import is_expert
from hawqtool.pipeline.artifacts import plan_document, write_json
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.progress import Reporter
from hawqtool.pipeline.refining import BlockRefiner, split_rows
from hawqtool.records import BitPlan, LinearSpec, RoundedLayer, Rows
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.fake import Start
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.layer import RoundingMethod, Task, quantized, round_layers, with_codes
from hawqtool.rounding.refine import Schedule


class Sink(Protocol):
    """Takes what rounding changes: `CheckpointWriter`, or something in memory."""

    def write_layer(self, layer: RoundedLayer) -> None:
        """A rounded layer."""

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """New value of a tensor that is not packed, by its name in the checkpoint."""


def round_to_folder(
    job: Job, plan: BitPlan, rows: Rows, folder: Path, reporter: Reporter, label: str
) -> dict[str, Any]:
    """Round every layer by plan on the quantized prefix and write a packed checkpoint with its records.

    Args:
        job: The model.
        plan: Formats by unit.
        rows: Rounding rows.
        folder: Folder to create; holds weights, config.json, ``reproduce/plan.json`` and ``checksums.json``.
        reporter: Progress.
        label: Name of the plan in the progress.

    Returns:
        ``layers`` (metrics by layer), ``refinement`` (what it changed by block), ``seconds`` and ``total_bytes``.
    """
    start = time.perf_counter()
    folder.mkdir(parents=True)
    layout = job.layout(plan.formats)
    with CheckpointWriter(job.index, layout, folder) as writer:
        record = round_blocks(job, plan.formats, rows.tokens, writer, reporter, label)
        changed = sorted(writer.changed)
        writer.copy_rest()
    seconds = time.perf_counter() - start
    _write_records(job, plan, folder, writer.checksums, changed, record["layers"], layout.total_bytes)
    return record | {"seconds": seconds, "total_bytes": layout.total_bytes}


def round_blocks(
    job: Job,
    formats: dict[str, QuantFormat],
    rows: Tensor,
    sink: Sink,
    reporter: Reporter,
    label: str,
    schedule: Schedule | None = None,
) -> dict[str, Any]:
    """Round, and where it is asked for refine, every layer on the quantized prefix.

    Args:
        job: The model.
        formats: Formats by unit.
        rows: Rounding rows.
        sink: Takes the result.
        reporter: Progress.
        label: Name of the plan in the progress.
        schedule: Steps and rates of the refinement (default: steps and seed of the configuration).

    Returns:
        ``layers`` (metrics by layer) and ``refinement`` (what it changed by block).
    """
    stream = job.stream()
    schedule = schedule or Schedule(job.config.refine_steps, job.config.seed)
    refiner = BlockRefiner(job, stream, rows, schedule) if schedule.steps else None
    activations = refiner.walked if refiner else _activations(job, stream, rows)
    walker = _Walker(job, job.layer_formats(formats), sink, keep_starts=refiner is not None)
    refinement: dict[str, Any] = {}
    blocks, steps = job.structure.blocks, max(schedule.steps, 1)
    stage = f"rounding and refining {label}" if refiner else f"rounding {label}"

    def tell(index: int, step: int) -> None:
        reporter.progress(stage, index * steps + step, len(blocks) * steps)

    for spec in blocks:
        walker.spec = spec
        with stream.block(spec.index) as block:
            walker.block = block
            if refiner:
                refiner.begin(block, spec)
            visit_groups(block, spec, activations, walker.visit)
            if refiner:
                if walker.starts:
                    refinement[spec.name] = _refine(refiner, walker, partial(tell, spec.index))
                refiner.advance(block, spec)
            walker.flush()
        tell(spec.index, steps)
    if job.structure.head:
        walker.block, walker.spec = stream.model, job.structure.head
        fitting = split_rows(rows)[0] if refiner else rows
        statistics = stream.head_statistics(fitting, activations)
        walker.visit(job.structure.head.input_groups[0], statistics)
        walker.flush()
    return {"layers": walker.metrics, "refinement": refinement}


def _activations(job: Job, stream: ModelStream, rows: Tensor) -> Activations:
    """What rounding without refinement walks on."""
    method = job.method
    return stream.embed(rows, job.rows_per_slice, method.needs_held_out, method.needs_drift)


class _Walker:
    """Rounds each input group of the current block and puts the result in place."""

    def __init__(self, job: Job, formats: dict[str, QuantFormat], sink: Sink, keep_starts: bool) -> None:
        self.job, self.formats, self.sink, self.keep_starts = job, formats, sink, keep_starts
        self.dtypes = job.stored_dtypes
        self.metrics: dict[str, Any] = {}
        self.block: Any = None
        self.spec: Any = None
        self.layers: dict[str, RoundedLayer] = {}
        self.starts: list[tuple[LinearSpec, Start]] = []

    def visit(self, group: Sequence[LinearSpec], statistics: GroupStatistics) -> None:
        """Round the planned layers of a group and replace their weights."""
        planned = {linear.name: linear for linear in group if linear.name in self.formats}
        if not planned:
            return
        tasks = [
            Task(name, read_weight(self.block, self.spec, linear), self.formats[name], self.dtypes[name])
            for name, linear in planned.items()
        ]
        damping = self.job.method.damping
        factor = factorize(statistics.gram, statistics.num_tokens, damping, name=tasks[0].name)
        for task, layer in zip(tasks, round_layers(tasks, statistics, factor, self.job.method), strict=True):
            self.layers[layer.name] = layer
            if self.keep_starts:
                # A copy: on a CPU the task holds the block's own weight, which is about to be replaced.
                original = task.weight.to(task.stored_dtype, copy=True)
                start = Start(layer.name, original, quantized(layer), layer.quant_format)
                self.starts.append((planned[layer.name], start))
            self.put(planned[layer.name], quantized(layer))
            self.metrics[layer.name] = {
                "num_tokens": statistics.num_routed,
                "fallback": _fallback(statistics, self.job.method),
            }

    def put(self, linear: LinearSpec, value: Quantized) -> None:
        """Replace a weight of the block."""
        replace_weight(self.block, self.spec, linear, dequantize(*value))

    def flush(self) -> None:
        """Hand on the layers of the block and forget them."""
        for name, layer in self.layers.items():
            self.sink.write_layer(layer)
            own = self.metrics[name]
            self.metrics[name] = asdict(layer.metrics) | {"format": layer.quant_format.label} | own
        self.layers, self.starts = {}, []


def _refine(refiner: BlockRefiner, walker: _Walker, progress: Callable[[int], None]) -> dict[str, Any]:
    """Refine the walker's block; returns what the report says of it."""
    refined = refiner.finish(walker.block, walker.spec, walker.starts, progress)
    for linear, start in walker.starts:
        value = refined.result.layers[linear.name]
        walker.put(linear, value)
        walker.layers[linear.name] = with_codes(walker.layers[linear.name], value, start.weight)
    for name, gain in refined.tensors.items():
        walker.sink.write_changed(name, gain)
    return refined.record


def _fallback(statistics: GroupStatistics, method: RoundingMethod) -> str | None:
    """What replaced tokens that an expert lacked, and settings that could not be chosen without them."""
    lent = statistics.num_tokens - statistics.num_routed
    found = [f"statistics with {lent} tokens that were routed to other experts"] if lent else []
    if method.needs_held_out and statistics.fitting is None:
        found.append("rounded as gptq, for no held-out tokens or no others came here to choose settings on")
    return "; ".join(found) or None


def _write_records(
    job: Job,
    plan: BitPlan,
    folder: Path,
    checksums: dict[str, str],
    changed: Sequence[str],
    metrics: dict[str, Any],
    total_bytes: int,
) -> None:
    others = job.unquantized_linears
    units = {m.name: unit.name for unit in job.units for m in unit.members}
    aliases = {m.name: m.module for unit in job.units for m in unit.members if m.module and not is_expert(m.name)}
    config = quantization_config(job.layer_formats(plan.formats), units, others, aliases)
    write_config(job.index.folder, folder, config)
    written = {"total_bytes": total_bytes, "transformers_obstacle": job.structure.obstacle}
    reproduce = folder / "reproduce"
    reproduce.mkdir()
    write_json(reproduce / "plan.json", plan_document(plan, job.units, others) | written)
    errors = {name: values["weight_error"] for name, values in metrics.items()}
    record = {"tensors": checksums, "weight_error": errors, "changed": list(changed)}
    write_json(reproduce / "checksums.json", record)
