"""Distil the original model into the scales and norm gains of a rounded one, in memory or in a written folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.packing import pack_codes
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.export.layout import Layout
from hawqtool.export.packed_reader import relative_weight_error
from hawqtool.export.stored.weights import PACKED, SCALE, packed_parts, unpack_parts
from hawqtool.export.writer import CheckpointWriter, unfinished_reader
from hawqtool.model.block import BlockCall, LoadedBlock
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.stages.refine import BATCH_ROWS, BlockForward, batch_sizes, can_share, norm_gains, split_rows
from hawqtool.records import BitPlan, LayerFormats, UnitFormats
from hawqtool.report.schema import Training
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.learned.end_to_end import DistillRows, DistillSchedule, TrainableBlock, distill
from hawqtool.rounding.spec import InitialRounding
from hawqtool.runtime.ranks import Ranks
from hawqtool.runtime.store import Saved
from hawqtool.streaming.stream import ModelStream

CODE_MARGIN = 0.1
"""Least distance of an offset from the borders of its cell at the start, in codes.

The first steps move all offsets alike, and those next to a border would change their code by the sign of one noisy
gradient. On SmolLM2 at 3 bits, 256 steps, KL on three texts is 0 to 5 % less than without.
"""

CODE_RATE = 6e-3
"""First step of the rounding offsets, in codes; three times less gained less in as many steps."""

KEPT_TOKENS = "rounding tokens"
"""Key under which ranks keep the rows that are learned from."""

_LEARNED, _REPLACED = "distilled", "replaced"
"""Keys of the result, and of what it replaces in the files: the first is damaged alone where the second is there."""


@dataclass(frozen=True)
class DistilledModel:
    """What distillation changed.

    Args:
        layers: Codes, scales and zero points by layer of the blocks.
        gains: Norm gains by the name of their tensor, all of them.
        weight_errors: Relative squared error of the weights by layer, as it is now.
        record: What the report says of it.
    """

    layers: dict[str, Quantized]
    gains: dict[str, Tensor]
    weight_errors: dict[str, float]
    record: Training


@dataclass
class Written:
    """What is known of a checkpoint that was written.

    Args:
        checksums: SHA-256 of the stored bytes of every tensor by name.
        changed: Tensors that are not packed and not the original's either.
        layers: Metrics by layer.
        refinement: What refinement changed, by block.
        seconds: Time that interrupted starts took.
    """

    checksums: dict[str, str]
    changed: list[str]
    layers: dict[str, Any]
    refinement: dict[str, Any]
    seconds: float


def schedule_of(config: RunConfig) -> DistillSchedule:
    """Steps and rates that a configuration asks for."""
    if not config.distill_codes:
        return DistillSchedule(config.distill_steps, config.seed)
    return DistillSchedule(config.distill_steps, config.seed, latent_rate=CODE_RATE, margin=CODE_MARGIN)


def learned_names(saved: Saved) -> set[str]:
    """Tensors that distillation may have replaced, where it had learned everything when it was cut; else none."""
    known = saved.load(_LEARNED)
    if known is None:
        return set()
    return {*(f"{name}{suffix}" for name in known["layers"] for suffix in (PACKED, SCALE)), *known["gains"]}


def put_back(index: CheckpointIndex, layout: Layout, folder: Path, saved: Saved) -> Written | None:
    """Undo the replacement of tensors by distillation in a written folder, so that it can be done anew.

    Returns:
        What is known of the folder as rounding left it; None where nothing was replaced, or nobody can say what.
    """
    known = saved.load(_REPLACED)
    if known is None or unfinished_reader(layout, folder) is None:
        return None
    written, tensors = Written(**known["written"]), known["tensors"]
    _overwrite(index, layout, folder, written, tensors)
    return written


def _overwrite(
    index: CheckpointIndex, layout: Layout, folder: Path, written: Written, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Replace tensors of a written folder; checksums of all of its tensors as they are then."""
    kept = {name: digest for name, digest in written.checksums.items() if name not in tensors}
    with CheckpointWriter(index, layout, folder, kept) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.checksums


def distill_folder(
    context: RunContext,
    plan: BitPlan,
    layout: Layout,
    folder: Path,
    written: Written,
    rows: Tensor,
    label: str,
) -> DistilledModel:
    """Distil into a checkpoint that is written already: its scales and norm gains are replaced in place.

    Args:
        context: The run; its store keeps where the learning is, its result, and what that replaces.
        plan: Formats by unit.
        layout: Of the checkpoint.
        folder: Where it lies.
        written: What is known of it; brought up to date.
        rows: Rounding rows.
        label: Name of the plan in the progress.
    """
    job, saved = context.job, context.saved
    reader = unfinished_reader(layout, folder)
    assert reader is not None  # the caller has seen its files
    known = saved.load(_LEARNED)
    if known is None:
        rounded = _layers(job, plan.formats, reader)
        changed = {name: reader.tensor(name) for name in written.changed}
        if can_share(rows, context.ranks):
            context.keep(KEPT_TOKENS, rows)
            context = replace(context, job=context.shared(_distill_along, plan.formats, folder, written.changed))
        learned = distill_model(context, plan.formats, rounded, changed, rows, label)
    else:
        restored = {name: Quantized(*parts) for name, parts in known["layers"].items()}
        learned = DistilledModel(**known | {"layers": restored})
    tensors = _stored(learned, job.layer_formats(plan.formats))
    if known is None:
        replaced = {name: reader.tensor(name) for name in tensors}
        saved.save(_REPLACED, {"written": vars(written), "tensors": replaced})
        saved.save(_LEARNED, vars(learned))
    written.checksums = _overwrite(job.index, layout, folder, written, tensors)
    written.changed = sorted({*written.changed, *learned.gains})
    for name, error in learned.weight_errors.items():
        written.layers[name]["weight_error"] = error
    return learned


def _distill_along(job: Job, formats: UnitFormats, folder: Path, changed: Sequence[str]) -> None:
    """A rank's share of a distillation; what was rounded it reads from the leader's files."""
    reader = unfinished_reader(job.layout(formats), folder)
    assert reader is not None  # the leader has seen its files
    norms = {name: reader.tensor(name) for name in changed}
    distill_model(RunContext(job), formats, _layers(job, formats, reader), norms, job.ranks.kept[KEPT_TOKENS], "")


def _stored(learned: DistilledModel, formats: LayerFormats) -> dict[str, Tensor]:
    """What was learned, by tensor of the files."""
    tensors = dict(learned.gains)
    for name, layer in learned.layers.items():
        tensors[name + PACKED] = pack_codes(layer.codes, formats[name].bits)
        tensors[name + SCALE] = layer.scales
    return tensors


def _layers(job: Job, formats: UnitFormats, reader: TensorReader) -> dict[str, Quantized]:
    """All packed layers, from the files."""
    linears = {linear.name: linear for unit in job.units for linear in unit.members}
    rounded = {}
    for name, quant_format in job.layer_formats(formats).items():
        shape = linears[name].out_features, linears[name].in_features
        parts = {suffix: part.to(job.device) for suffix, part in packed_parts(reader, name).items()}
        rounded[name] = unpack_parts(parts, quant_format, shape)
    return rounded


def distill_model(
    context: RunContext,
    formats: UnitFormats,
    rounded: Mapping[str, Quantized],
    changed: Mapping[str, Tensor],
    rows: Tensor,
    label: str,
    schedule: DistillSchedule | None = None,
) -> DistilledModel:
    """Learn scales, norm gains and, if wanted, codes of all blocks; the whole model is on the device.

    The rows that refinement holds out are held out here too. A rounded output head takes part and stays as it is.

    Args:
        context: The run; its store keeps where the learning is.
        formats: Formats by unit.
        rounded: Codes, scales and zero points by layer.
        changed: Norm gains that are not the original's any more, by the name of their tensor.
        rows: Rounding rows, which the job's ranks share.
        label: Name of the plan in the progress.
        schedule: Steps and rates (default: those of the configuration).

    Raises:
        UsageError: If there is one row only.
        NumericalError: If the rounded model's outputs are not finite.
    """
    job = context.job
    schedule = schedule or schedule_of(job.config)
    size = BATCH_ROWS[job.device.type]
    parts, fitting = _own_batches(rows, size, job.ranks)
    original, stream = job.stream(), job.stream()
    embedded = [stream.embed(part, size) for part in parts]
    calls = [found.calls[0] for found in embedded]
    goals = [original.final_hidden(part, size, lambda _: None) for part in parts]
    _replace_head(job, stream, rounded)
    with ExitStack() as resident:
        blocks = [resident.enter_context(stream.block(spec.index)) for spec in job.structure.blocks]
        names = [norm_gains(job, block) for block in blocks]
        layer_formats = job.layer_formats(formats)
        trainable_blocks = [
            _trainable(block, _initial(job, block, rounded, layer_formats), gains, changed, calls)
            for block, gains in zip(blocks, names, strict=True)
        ]
        found = distill(
            trainable_blocks,
            DistillRows(
                [states.hidden[0] for states in embedded],
                fitting,
                [OutputComparison(original, stream, part, goal) for part, goal in zip(parts, goals, strict=True)],
                job.ranks,
            ),
            schedule,
            lambda done: context.reporter.progress(f"distilling {label}", done, schedule.steps),
            context.saved,
        )
        errors = _weight_errors(blocks, found.layers)
    by_block = zip(names, found.gains, strict=True)
    gains = {tensors[name][0]: gain for tensors, learned in by_block for name, gain in learned.items()}
    return DistilledModel(found.layers, gains, errors, cast(Training, found.log.record | {"seconds": found.seconds}))


def _own_batches(rows: Tensor, size: int, ranks: Ranks) -> tuple[list[Tensor], int]:
    """This rank's rows in batches that have so many in all ranks, and how many of them are learned from."""
    fitting, held_out = split_rows(rows)
    sizes = batch_sizes(len(fitting), size, ranks)
    own = (some[ranks.share(len(some))] for some in (fitting, held_out))
    return [*next(own).split(sizes), *next(own).split(size)], len(sizes)


def _weight_errors(blocks: Sequence[LoadedBlock], layers: Mapping[str, Quantized]) -> dict[str, float]:
    """Of every layer as it is now, against the block's own weights, which are the original's."""
    return {
        linear.name: relative_weight_error(block.weight(linear), dequantize(*layers[linear.name]))
        for block in blocks
        for linear in block.spec.linears
        if linear.name in layers
    }


def _initial(
    job: Job, block: LoadedBlock, rounded: Mapping[str, Quantized], formats: LayerFormats
) -> list[InitialRounding]:
    """Rounded layers of a block, with the original's weights as the block holds them."""
    layers = []
    for linear in (linear for linear in block.spec.linears if linear.name in rounded):
        weight = block.parameter(linear).detach()
        weight = weight.t() if linear.transposed else weight
        layer = _on(job.device, rounded[linear.name])
        layers.append(InitialRounding(linear.name, weight, layer, formats[linear.name]))
    return layers


def _trainable(
    block: LoadedBlock,
    initial: Sequence[InitialRounding],
    names: Mapping[str, tuple[str, torch.dtype]],
    changed: Mapping[str, Tensor],
    calls: Sequence[Sequence[BlockCall]],
) -> TrainableBlock:
    device = next(block.module.parameters()).device
    gains = {
        name: (changed.get(tensor, block.module.get_parameter(name).detach()).to(device), dtype)
        for name, (tensor, dtype) in names.items()
    }
    return TrainableBlock(initial, gains, BlockForward(block, calls))


def _replace_head(job: Job, stream: ModelStream, rounded: Mapping[str, Quantized]) -> None:
    head = stream.head
    for linear in head.spec.linears if head else ():
        if head and linear.name in rounded:
            head.set_weight(linear, dequantize(*_on(job.device, rounded[linear.name])))


def _on(device: torch.device, layer: Quantized) -> Quantized:
    zeros = None if layer.zeros is None else layer.zeros.to(device)
    return Quantized(layer.codes.to(device), layer.scales.to(device), zeros)
