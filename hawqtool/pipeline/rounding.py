"""Round a model by plan and write it, block by block."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hawqtool.errors import disk_errors
from hawqtool.export.compressed_tensors import quantization_config
from hawqtool.export.packed import packed_parts, unpack_parts
from hawqtool.export.writer import CheckpointWriter, intact, unfinished_reader, write_config
from hawqtool.formats import QuantFormat
from hawqtool.model.reader import TensorReader
from hawqtool.model.saving import NOTHING_SAVED, Saved
from hawqtool.model.statistics import GroupStatistics
from hawqtool.model.sweep import read_weight, replace_weight
from hawqtool.model.units import is_expert
from hawqtool.model.visiting import revisit_groups, visit_groups
from hawqtool.pipeline.artifacts import PART, plan_document, write_json
from hawqtool.pipeline.job import Job
from hawqtool.pipeline.progress import Reporter
from hawqtool.records import BitPlan, LinearSpec, Rows
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.grid import dequantize
from hawqtool.rounding.layer import RoundingMethod, Task, round_layers

ROUNDING = "rounding"
"""Key under which the result of a rounding is saved."""


def round_to_folder(
    job: Job,
    plan: BitPlan,
    rows: Rows,
    folder: Path,
    reporter: Reporter,
    label: str,
    saved: Saved = NOTHING_SAVED,
) -> dict[str, Any]:
    """Round every layer by plan on the quantized prefix and write a packed checkpoint with its records.

    An interrupted rounding is gone on with: blocks whose layers lie in the unfinished files, as their checksums tell,
    are walked with the weights read back instead of rounded again.

    Args:
        job: The model.
        plan: Formats by unit.
        rows: Rounding rows.
        folder: Folder to create; holds weights, config.json, ``reproduce/plan.json`` and ``checksums.json``. Until it
            is complete its name ends in ``.part``.
        reporter: Progress.
        label: Name of the plan in the progress.
        saved: Keeps what is known of finished blocks, and at the end the result.

    Returns:
        ``layers`` (metrics by layer), ``seconds`` and ``total_bytes``.
    """
    start = time.perf_counter()
    part = folder.with_name(f"{folder.name}{PART}")
    layout, blocks = job.layout(plan.formats), saved.part("block")
    reader = unfinished_reader(layout, part)
    done = [] if reader is None else _intact_blocks(job, reader, blocks)
    if not done:
        _make_anew(part)
    earlier = done[-1]["seconds"] if done else 0.0
    kept = {name: digest for block in done for name, digest in block["checksums"].items()}
    metrics = {name: values for block in done for name, values in block["layers"].items()}
    with CheckpointWriter(job.index, layout, part, kept) as writer:
        walker = _Walker(job, job.layer_formats(plan.formats), writer, metrics, reader)
        _walk(job, rows, walker, len(done), lambda: earlier + time.perf_counter() - start, blocks, reporter, label)
        writer.copy_rest()
    seconds = earlier + time.perf_counter() - start
    with disk_errors(part):
        _write_records(job, plan, part, writer.checksums, metrics, layout.total_bytes)
    result = {"layers": metrics, "seconds": seconds, "total_bytes": layout.total_bytes}
    saved.save(ROUNDING, result)
    with disk_errors(folder):
        part.rename(folder)
    blocks.drop()
    return result


def _make_anew(folder: Path) -> None:
    with disk_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def _intact_blocks(job: Job, reader: TensorReader, blocks: Saved) -> list[dict[str, Any]]:
    """What was saved of the leading blocks whose layers lie in the files as they were written."""
    done = []
    for spec in job.structure.blocks:
        known = blocks.load(str(spec.index))
        if known is None or not intact(reader, known["checksums"]):
            break
        done.append(known)
    return done


def _walk(
    job: Job,
    rows: Rows,
    walker: _Walker,
    done: int,
    seconds: Callable[[], float],
    blocks: Saved,
    reporter: Reporter,
    label: str,
) -> None:
    """Round block after block, the first ``done`` ones aside, whose weights are read back."""
    stream, count = job.stream(), len(job.structure.blocks)
    activations = stream.embed(rows.tokens, job.rows_per_slice, job.method.needs_held_out, job.method.needs_drift)
    for spec in job.structure.blocks:
        with stream.block(spec.index) as block:
            walker.block, walker.spec = block, spec
            if spec.index < done:
                revisit_groups(block, spec, activations, walker.read_back)
            else:
                visit_groups(block, spec, activations, walker.visit)
                blocks.save(str(spec.index), walker.take_block() | {"seconds": seconds()})
        reporter.progress(f"rounding {label}", spec.index + 1, count)
    if job.structure.head:
        walker.block, walker.spec = stream.model, job.structure.head
        statistics = stream.head_statistics(rows.tokens, activations)
        walker.visit(job.structure.head.input_groups[0], statistics)


class _Walker:
    """Rounds each input group of the current block and puts the result in place."""

    def __init__(
        self,
        job: Job,
        formats: dict[str, QuantFormat],
        writer: CheckpointWriter,
        metrics: dict[str, Any],
        reader: TensorReader | None,
    ) -> None:
        self.job, self.formats, self.writer, self.metrics, self.reader = job, formats, writer, metrics, reader
        self.dtypes = job.stored_dtypes
        self._known_layers, self._known_tensors = set(metrics), set(writer.checksums)
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
        damping = self.job.method.damping
        factor = factorize(statistics.gram, statistics.num_tokens, damping, name=tasks[0].name)
        for layer in round_layers(tasks, statistics, factor, self.job.method):
            self.writer.write_layer(layer)
            weight = dequantize(layer.codes, layer.scales, layer.zeros)
            replace_weight(self.block, self.spec, planned[layer.name], weight)
            self.metrics[layer.name] = (
                asdict(layer.metrics)
                | {"format": layer.quant_format.label}
                | {"num_tokens": statistics.num_routed, "fallback": _fallback(statistics, self.job.method)}
            )

    def read_back(self) -> None:
        """Put the weights of the current block's rounded layers in place, from the unfinished files."""
        assert self.reader is not None  # otherwise no block is done
        for linear in (linear for linear in self.spec.linears if linear.name in self.formats):
            shape = linear.out_features, linear.in_features
            parts = packed_parts(self.reader, linear.name)
            codes, scales, zeros = unpack_parts(parts, self.formats[linear.name], shape)
            device = self.job.device
            weight = dequantize(codes.to(device), scales.to(device), None if zeros is None else zeros.to(device))
            replace_weight(self.block, self.spec, linear, weight)

    def take_block(self) -> dict[str, Any]:
        """Metrics and checksums that came since the last call."""
        layers = {name: values for name, values in self.metrics.items() if name not in self._known_layers}
        checksums = {name: digest for name, digest in self.writer.checksums.items() if name not in self._known_tensors}
        self._known_layers |= layers.keys()
        self._known_tensors |= checksums.keys()
        return {"layers": layers, "checksums": checksums}


def _fallback(statistics: GroupStatistics, method: RoundingMethod) -> str | None:
    """What replaced tokens that an expert lacked, and settings that could not be chosen without them."""
    lent = statistics.num_tokens - statistics.num_routed
    found = [f"statistics with {lent} tokens that were routed to other experts"] if lent else []
    if method.needs_held_out and statistics.fitting is None:
        found.append("rounded as gptq, for no held-out tokens or no others came here to choose settings on")
    return "; ".join(found) or None


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
    reproduce.mkdir(exist_ok=True)
    write_json(reproduce / "plan.json", plan_document(plan, job.units, others) | written)
    errors = {name: values["weight_error"] for name, values in metrics.items()}
    write_json(reproduce / "checksums.json", {"tensors": checksums, "weight_error": errors})
