"""From a checkpoint and a template to a mixed GGUF file: measure, allocate, round, write, evaluate."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from hawqtool.allocation.problem import AllocationProblem
from hawqtool.checkpoint.gguf.block_codec import BlockFields, block_grid, grid_values, pack_blocks
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig
from hawqtool.errors import InputError, NumericalError, UsageError, disk_errors
from hawqtool.evaluation.divergence import as_record
from hawqtool.export.gguf.writer import GgufWriter
from hawqtool.export.manifest import file_hash
from hawqtool.export.packed_reader import relative_weight_error
from hawqtool.model.block import LoadedBlock
from hawqtool.pipeline.gguf.evaluation import GgufEvaluator
from hawqtool.pipeline.gguf.record import SCHEMA, matrix_records, record_path
from hawqtool.pipeline.gguf.tensors import GgufJob, prepare_gguf
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import write_json
from hawqtool.pipeline.run.identity import check_unchanged, stamps
from hawqtool.pipeline.search.planner import allocate
from hawqtool.pipeline.stages.measure import check_scores
from hawqtool.pipeline.stages.rows import gather_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.records import BitPlan, MeasurementRows, Menu, Rows, UnitFormats, UnitScores
from hawqtool.report.documents import GgufDocument, GgufQuality
from hawqtool.rounding.blocks.spec import BlockRounding, round_alone
from hawqtool.runtime.reporter import Reporter
from hawqtool.sensitivity.measure import SweepSettings, measure
from hawqtool.streaming.dealt import Groups
from hawqtool.streaming.input_statistics import collect_statistics
from hawqtool.values import parse_size

Plan = Mapping[str, BlockType]
"""Type of every unit, which is a tensor."""


def run_gguf(config: RunConfig, reporter: Reporter) -> GgufDocument:
    """``hawqtool quantize --to gguf``: write a file for llama.cpp, of exactly the size that was planned.

    Args:
        config: The run's configuration, with a template.
        reporter: Narration and progress.

    Returns:
        The record, which lies beside the file too (`hawqtool.gguf/1`).

    Raises:
        HawqError: With nothing left behind.
    """
    start, output = time.perf_counter(), output_file(config)
    gguf = prepare_gguf(config, reporter)
    before = stamps(gguf.job.index)
    budget = _budget(gguf)
    if budget is not None:
        _check_feasible(gguf, budget)
    _announce(gguf, budget, reporter)
    context = RunContext(gguf.job, reporter)
    sets = gather_rows(context)
    calibration = with_token_importance(context, sets["calibration"]) if "calibration" in sets else None
    plan = _plan(context, gguf, sets, calibration, budget)
    layout = gguf.layout(_types(plan))
    with GgufWriter(gguf.template, layout, output) as writer:
        file = _FileInWork(gguf, writer)
        file.write_ends()
        _write_blocks(context, plan, calibration, file)
        check_unchanged(gguf.job.index, before)
    try:
        if output.stat().st_size != layout.total_bytes:
            raise NumericalError(f"{output} has {output.stat().st_size} bytes; {layout.total_bytes} were planned")
        document = _document(file, plan, _judged(context, gguf, sets, output), output)
        document["seconds"] = time.perf_counter() - start
        with disk_errors(output):
            write_json(record_path(output), cast(dict[str, Any], document))
        if config.tensor_types is not None:
            write_type_list(Path(config.tensor_types), {**gguf.ends, **_types(plan)})
    except BaseException:
        for path in (output, record_path(output)):
            path.unlink(missing_ok=True)
        raise
    return document


def output_file(config: RunConfig) -> Path:
    """The file to write.

    Raises:
        UsageError: If there is none, it exists, or its folder does not.
    """
    if config.output is None or not config.output.endswith(".gguf"):
        raise UsageError(f"--to gguf writes one file, found --output {config.output}; name it, such as out.gguf")
    output = Path(config.output).resolve()
    if not output.parent.is_dir():
        raise UsageError(f"the parent folder of {config.output} does not exist; create it first")
    for path in (output, record_path(output)):
        if path.exists():
            raise UsageError(f"{path} exists; remove it or choose another name")
    return output


def write_type_list(path: Path, types: Mapping[str, BlockType]) -> None:
    """Write types by tensor as llama-quantize takes them with ``--tensor-type-file``: a line ``pattern=type`` each."""
    lines = [f"^{re.escape(name)}$={kind.name.lower()}\n" for name, kind in types.items()]
    with disk_errors(path):
        path.write_text("".join(lines), encoding="utf-8")


def _types(plan: BitPlan) -> Plan:
    return cast(Plan, plan.formats)


def _budget(gguf: GgufJob) -> int | None:
    """Most stored bytes of all units; None where every unit has one type."""
    config, units = gguf.job.config, gguf.job.units
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
        f"{several} may have {len(gguf.menu[several])} types; give --target-bpw or --target-size, or one of "
        "--block-types that fits all tensors"
    )


def _announce(gguf: GgufJob, budget: int | None, reporter: Reporter) -> None:
    weights = sum(unit.num_weights for unit in gguf.job.units)
    low, high = (
        gguf.layout({name: choose(kinds, key=lambda kind: kind.bits) for name, kinds in gguf.menu.items()}).total_bytes
        for choose in (min, max)
    )
    reporter.say(f"{len(gguf.job.units)} tensors with {weights:,} weights to quantize; {len(gguf.kept)} matrices stay")
    for name, reason in gguf.kept.items():
        reporter.say(f"stays       {name}: {reason}")
    for name, kind in gguf.ends.items():
        reporter.say(f"{name} becomes {kind.name}, rounded by itself")
    target = "" if budget is None else f"; the target leaves {8 * budget / weights:.3f} bits per weight"
    reporter.say(f"files of {low:,} to {high:,} bytes are in reach{target}")


def _check_feasible(gguf: GgufJob, budget: int) -> None:
    """Check before the work that the smallest types keep the budget.

    Raises:
        UsageError: Otherwise; states what is in reach.
    """
    units, weights = gguf.job.units, sum(unit.num_weights for unit in gguf.job.units)
    sizes = [[kind.num_bytes(unit.num_weights) for kind in gguf.menu[unit.name]] for unit in units]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    if budget < low:
        raise UsageError(
            f"the target of {8 * budget / weights:.3f} bits per weight cannot be met: {8 * low / weights:.3f} to "
            f"{8 * high / weights:.3f} are in reach; raise the target or add smaller --block-types"
        )


def _plan(
    context: RunContext, gguf: GgufJob, sets: Mapping[str, Rows], calibration: Rows | None, budget: int | None
) -> BitPlan:
    """The plan of least predicted loss within the budget, from measured scores."""
    job, menu = gguf.job, cast(Menu, gguf.menu)
    fixed = {name: kinds[0] for name, kinds in menu.items() if len(kinds) == 1}
    scores: UnitScores = {}
    if len(fixed) < len(menu):
        assert calibration is not None  # rows are left out where nothing is to be measured
        found = measure(
            job.stream(),
            MeasurementRows(calibration, sets["scoring"].tokens, job.settings.batch_size),
            BlockRounding(job.settings.method, menu, job.stored_dtypes),
            SweepSettings(job.config.seed),
            context.reporter.progress,
        )
        check_scores(found.scores, found.projections)
        scores = found.scores[job.settings.metric]
    if budget is None:
        budget = sum(kinds[0].num_bytes(unit.num_weights) for unit in job.units for kinds in [gguf.menu[unit.name]])
    return allocate(job.units, menu, scores, cast(UnitFormats, fixed), budget, job.settings.metric, job.config)


class _FileInWork:
    """Takes what is rounded, and keeps what the record says of it.

    Args:
        gguf: The job.
        writer: Writer of the file.

    Attributes:
        output_errors: Squared error of outputs over squared outputs, by linear.
        weight_errors: Squared error over squared weights, by the checkpoint's tensor.
    """

    def __init__(self, gguf: GgufJob, writer: GgufWriter) -> None:
        self.gguf, self._writer = gguf, writer
        self.output_errors: dict[str, float] = {}
        self.weight_errors: dict[str, float] = {}

    def write(self, name: str, weight: Tensor, fields: BlockFields, kind: BlockType) -> None:
        """Pack rows in the template's order and write them.

        Args:
            name: Name of the checkpoint's tensor.
            weight: ``[out, in]``, what was rounded.
            fields: What it became.
            kind: Type of the blocks.
        """
        place, stored = self.gguf.places[name], pack_blocks(fields, kind)
        restored = grid_values(fields.codes, block_grid(fields, kind), kind)
        self.weight_errors[name] = relative_weight_error(weight, restored)
        if place.piece.rows is not None:
            stored = stored[place.piece.rows.to(stored.device)]
        self._writer.write(place.tensor, stored, place.first_row)

    def write_ends(self) -> None:
        """Round and write embedding and output."""
        gguf, reader = self.gguf, TensorReader(self.gguf.job.index)
        for name, place in gguf.places.items():
            if place.tensor in gguf.ends:
                weight = gguf.matrix(name, reader).float().to(gguf.job.device)
                kind = gguf.ends[place.tensor]
                self.write(name, weight, round_alone(name, weight, kind), kind)


def _write_blocks(context: RunContext, plan: BitPlan, calibration: Rows | None, file: _FileInWork) -> None:
    """Round block by block on the quantized prefix and write."""
    if calibration is None:
        raise InputError("no calibration rows; expected some, as rounding to block types needs inputs; run again")
    job = context.job
    one_each = {unit: (kind,) for unit, kind in plan.formats.items()}
    rounding = BlockRounding(job.settings.method, one_each, job.stored_dtypes)
    stream = job.stream()
    method = job.settings.method
    activations = stream.embed(
        *(calibration.tokens, job.settings.batch_size, method.compensates, method.needs_drift, calibration.importance)
    )
    stream.release_ends()
    progress = context.progress("rounding")

    def visit(block: LoadedBlock, groups: Groups) -> None:
        for group, statistics in groups:
            linears = {linear.name: linear for linear in group}
            for layer, weight in rounding.layers(block, group, statistics):
                file.write(f"{layer.name}.weight", weight, layer.fields, layer.kind)
                file.output_errors[layer.name] = layer.output_error
                block.set_weight(linears[layer.name], layer.values)

    for spec in job.structure.blocks:
        with stream.block(spec.index) as block:
            collect_statistics(block, activations, partial(visit, block))
        progress(spec.index + 1, len(job.structure.blocks))
    if stream.head is not None:
        statistics = stream.head_statistics(calibration.tokens, activations)
        visit(stream.head, [(stream.head.spec.input_groups[0], statistics)])


def _judged(context: RunContext, gguf: GgufJob, sets: Mapping[str, Rows], output: Path) -> GgufQuality | None:
    """Quality of original and file on the report rows; None where that is not asked for."""
    if not gguf.job.config.evaluates:
        return None
    original, quantized = GgufEvaluator(context, sets["report"], gguf.places).judged(output)
    return {"original": as_record(original), "quantized": as_record(quantized)}


def _document(file: _FileInWork, plan: BitPlan, quality: GgufQuality | None, output: Path) -> GgufDocument:
    gguf = file.gguf
    types = {**gguf.ends, **_types(plan)}
    return {
        "schema": SCHEMA,
        "model": gguf.job.source.name,
        "template": gguf.template.path.name,
        "output": output.name,
        "bytes": output.stat().st_size,
        "sha256": file_hash(output),
        "bpw": plan.bpw,
        "num_weights": plan.num_weights,
        "metric": plan.metric if len(set(map(len, gguf.menu.values())) - {1}) else None,
        "predicted_loss": plan.predicted_loss,
        "types": {name: kind.name for name, kind in types.items()},
        "kept": dict(gguf.kept),
        "matrices": matrix_records(gguf.places, file.weight_errors),
        "output_error": file.output_errors,
        "quality": quality,
        "seconds": 0.0,
    }
