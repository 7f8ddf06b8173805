"""Round a model by plan and write it, block by block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hawqtool.export.background import BackgroundWriter
from hawqtool.export.compressed_tensors import quantization_config
from hawqtool.export.writer import CheckpointWriter, write_config
from hawqtool.formats import QuantFormat
from hawqtool.model.sweep import GroupStatistics, read_weight, replace_weight, visit_groups
from hawqtool.model.units import is_expert
from hawqtool.pipeline.artifacts import plan_document, write_json
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.progress import Reporter
from hawqtool.records import BitPlan, LinearSpec, Rows
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import Task, round_layers


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
        ``layers`` (metrics by layer), ``seconds`` and ``total_bytes``.
    """
    start = time.perf_counter()
    folder.mkdir(parents=True)
    layout = job.layout(plan.formats)
    stream = job.stream()
    activations = stream.embed(rows.tokens, job.rows_per_slice)
    metrics: dict[str, Any] = {}
    with CheckpointWriter(job.index, layout, folder) as writer, BackgroundWriter(writer) as background:
        walker = _Walker(job, job.layer_formats(plan.formats), background, metrics)
        for spec in job.structure.blocks:
            with stream.block(spec.index) as block:
                walker.block, walker.spec = block, spec
                visit_groups(block, spec, activations, walker.visit)
            reporter.progress(f"rounding {label}", spec.index + 1, len(job.structure.blocks))
        if job.structure.head:
            walker.block, walker.spec = stream.model, job.structure.head
            statistics = stream.head_statistics(rows.tokens, activations.hidden)
            walker.visit(job.structure.head.input_groups[0], statistics)
    seconds = time.perf_counter() - start
    _write_records(job, plan, folder, writer.checksums, metrics, layout.total_bytes)
    return {"layers": metrics, "seconds": seconds, "total_bytes": layout.total_bytes}


class _Walker:
    """Rounds each input group of the current block and puts the result in place."""

    def __init__(
        self, job: Job, formats: dict[str, QuantFormat], writer: BackgroundWriter, metrics: dict[str, Any]
    ) -> None:
        self.job, self.formats, self.writer, self.metrics = job, formats, writer, metrics
        self.dtypes = job.stored_dtypes
        self.block: Any = None
        self.spec: Any = None

    def visit(self, group: Sequence[LinearSpec], statistics: GroupStatistics) -> None:
        """Round the planned layers of a group, write them and replace their weights."""
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
        for layer in round_layers(tasks, statistics.gram, factor, method, recorder):
            with recorder.stage("write"):
                self.writer.write_layer(layer)
            with recorder.stage("dequantize"):
                weight = dequantize(layer.codes, layer.scales, layer.zeros)
                replace_weight(self.block, self.spec, planned[layer.name], weight)
            self.metrics[layer.name] = (
                asdict(layer.metrics)
                | {"format": layer.quant_format.label}
                | {"num_tokens": statistics.num_routed, "fallback": _fallback(statistics)}
            )


def _fallback(statistics: GroupStatistics) -> str | None:
    """What replaced tokens that an expert lacked."""
    lent = statistics.num_tokens - statistics.num_routed
    return f"statistics with {lent} tokens that were routed to other experts" if lent else None


def _write_records(
    job: Job, plan: BitPlan, folder: Path, checksums: dict[str, str], metrics: dict[str, Any], total_bytes: int
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
    write_json(reproduce / "checksums.json", {"tensors": checksums, "weight_error": errors})
