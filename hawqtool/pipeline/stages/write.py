"""Round a model by plan and write it, block by block."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import disk_errors
from hawqtool.export.background_writer import BackgroundWriter
from hawqtool.export.compressed_tensors import quantization_config
from hawqtool.export.config_checks import dense_matrices
from hawqtool.export.embedding_table import table_tensors, with_tables
from hawqtool.export.layout import Layout
from hawqtool.export.manifest import file_hash
from hawqtool.export.stored.cache import cache_record
from hawqtool.export.writer import CheckpointWriter, intact, unfinished_reader, write_config
from hawqtool.formats.cache import cache_scheme
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import PART, plan_document, write_json
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.stages.distill import Written, distill_folder, learned_names, put_back
from hawqtool.pipeline.stages.refine import can_share
from hawqtool.pipeline.stages.round_blocks import Findings, Finished, round_blocks, round_weights
from hawqtool.pipeline.stages.token_importance import MOMENTS
from hawqtool.records import BitPlan, BlockSpec, RoundedLayer, Rows, UnitFormats
from hawqtool.report.schema import RoundingResult, Training
from hawqtool.report.wording import shown_plan
from hawqtool.runtime.ranks import ALONE
from hawqtool.runtime.reporter import Reporter, Silent
from hawqtool.runtime.store import NOTHING_SAVED, Saved

ROUNDING = "rounding"
"""Key under which the result of a rounding is saved."""

_ROWS = "rounding rows"
"""Key under which ranks keep them: with importances and moments they may take gigabytes."""

_WRITTEN, _AS_WRITTEN = "written", "as-written"
_RECORDS = ("config.json", "reproduce/plan.json", "reproduce/checksums.json")


def round_to_folder(
    context: RunContext,
    plan: BitPlan,
    rows: Rows | None,
    folder: Path,
    label: str,
) -> RoundingResult:
    """Round every layer by plan on the quantized prefix and write a packed checkpoint with its records.

    An interrupted rounding is gone on with: blocks whose layers lie in the unfinished files, as their checksums tell,
    are not rounded again, and those behind which hidden states were kept are not walked either.

    Args:
        context: The run; its store keeps what is known of finished blocks, and at the end the result.
        plan: Formats by unit.
        rows: Rounding rows; None where weights are rounded by themselves.
        folder: Folder to create; holds weights, config.json, ``reproduce/plan.json`` and ``checksums.json``. Until it
            is complete its name ends in ``.part``.
        label: Name of the plan in the progress.

    Returns:
        ``layers`` (metrics by layer), ``refinement`` (what it changed by block), ``distillation`` (what it changed in
        all), ``seconds`` and ``total_bytes``.
    """
    start = time.perf_counter()
    part = folder.with_name(f"{folder.name}{PART}")
    job, layout = context.job, context.job.layout(plan.formats)
    blocks, learning = context.part("block"), context.part("distill")
    written, distillation = _known(job, layout, part, learning.saved), Training()
    if written is None:
        written = _write_blocks(blocks, plan, layout, part, rows, label)
    if job.config.distill_steps and rows is not None:
        learning.saved.save(_WRITTEN, vars(written))
        learned = distill_folder(learning, plan, layout, part, written, rows.tokens, label)
        distillation = learned.record
    with disk_errors(part):
        _write_records(job, plan, part, written, layout.total_bytes)
    seconds = written.seconds + time.perf_counter() - start
    result: RoundingResult = {
        "layers": written.layers,
        "refinement": written.refinement,
        "distillation": distillation,
        "seconds": seconds,
        "total_bytes": layout.total_bytes,
    }
    context.saved.save(ROUNDING, result)
    context.saved.save(_AS_WRITTEN, {"tensors": written.checksums, "records": _record_hashes(part)})
    with disk_errors(folder):
        part.rename(folder)
    for finished in (blocks, learning):
        finished.saved.drop()
    return result


class Ahead(NamedTuple):
    """A plan to round ahead of its trial.

    Args:
        label: Its name in the progress.
        key: What its part of the store is called.
        plan: Formats by unit.
        folder: Folder to create.
        finished: Whether an earlier start of the run has done it.
    """

    label: str
    key: str
    plan: BitPlan
    folder: Path
    finished: bool


def round_side_by_side(context: RunContext, plans: Sequence[Ahead], rows: Rows | None) -> None:
    """Round several plans at once, each by a team of ranks; `round_to_folder` says what becomes of each.

    Whose plan is whose depends on their number and that of the ranks alone, so that a run that goes on does the same.

    Args:
        context: The run.
        plans: At most as many as there are ranks.
        rows: Rounding rows, as in `round_to_folder`.
    """
    _share_rows(context, rows)
    _round_in_team(context.shared(_round_in_team, plans, context.saved), plans, context.saved, context.reporter)


def _share_rows(context: RunContext, rows: Rows | None) -> None:
    """Have all ranks keep the rounding rows; moments that they made together they have."""
    kept = context.ranks.kept
    if context.ranks.size == 1 or kept.get(_ROWS) is rows:
        return
    have_moments = rows is not None and kept.get(MOMENTS) is rows.output_moments
    sent = replace(rows, output_moments={}) if rows is not None and have_moments else rows
    context.shared(_keep_rows, sent, have_moments)
    kept[_ROWS] = rows


def _keep_rows(job: Job, rows: Rows | None, have_moments: bool) -> None:
    if rows is not None and have_moments:
        rows = replace(rows, output_moments=job.ranks.kept[MOMENTS])
    job.ranks.kept[_ROWS] = rows


def _round_in_team(job: Job, plans: Sequence[Ahead], saved: Saved, reporter: Reporter | None = None) -> None:
    """A rank's part of plans that are rounded side by side."""
    all_ranks, rows = job.ranks, job.ranks.kept[_ROWS]
    number, team = all_ranks.teams(len(plans))
    if team is not None and not plans[number].finished:
        if team.leads:
            one = plans[number]
            context = RunContext(replace(job, ranks=ALONE), reporter or Silent(), saved.part(one.key), team)
            round_to_folder(context, one.plan, rows, one.folder, one.label)
            team.dismiss()
        else:
            team.serve(replace(job, ranks=team))
    all_ranks.everywhere(None)  # nobody reads what another has not finished


def is_as_written(context: RunContext, plan: BitPlan, folder: Path) -> bool:
    """Whether a folder that an earlier start of the run wrote has the bytes that were written then."""
    known = context.saved.load(_AS_WRITTEN)
    reader = unfinished_reader(context.job.layout(plan.formats), folder)
    if known is None or reader is None or known["records"] != _record_hashes(folder):
        return False
    return intact(reader, known["tensors"])


def _record_hashes(folder: Path) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in _RECORDS if (folder / name).is_file()}


def target_config(job: Job, formats: UnitFormats) -> dict[str, Any]:
    """The ``quantization_config`` for formats by unit.

    Raises:
        InputError: If the names of the model's layers are ambiguous to engines.
    """
    units = {m.name: unit.name for unit in job.units for m in unit.members}
    aliases = {m.name: m.module for unit in job.units for m in unit.members if m.module and not is_expert(m.name)}
    others, found = dense_matrices(job.index), job.layer_formats(formats)
    aliases = {name: module for name, module in aliases.items() if name in found}
    config = quantization_config(found, units, other_linears(job, formats), aliases, others)
    if job.caches:
        config["kv_cache_scheme"] = cache_scheme(job.config.kv_cache)
    return with_tables(config, job.tables)


def other_linears(job: Job, formats: UnitFormats) -> tuple[str, ...]:
    """Linears that stay as they are under formats by unit: those of every plan, and those that this one keeps."""
    kept = (m.name for unit in job.units if formats[unit.name].is_unquantized for m in unit.members)
    return *job.unquantized_linears, *kept


def _known(job: Job, layout: Layout, part: Path, learning: Saved) -> Written | None:
    """The record of a checkpoint whose distillation was cut, if the files are still those."""
    rounded = put_back(job.index, layout, part, learning)
    known, reader = learning.load(_WRITTEN), unfinished_reader(layout, part)
    written = rounded if known is None else Written(**known)
    if written is None or reader is None:
        return None
    # Where nothing was put back, scales and gains may have been replaced already, and will be once more.
    replaced = learned_names(learning)
    fixed = {name: digest for name, digest in written.checksums.items() if name not in replaced}
    return written if intact(reader, fixed) else None


def _write_blocks(
    context: RunContext,
    plan: BitPlan,
    layout: Layout,
    part: Path,
    rows: Rows | None,
    label: str,
) -> Written:
    """Round the blocks that are not finished, and write; the seconds are those before an interruption."""
    start = time.perf_counter()
    job, blocks = context.job, context.saved
    reader = unfinished_reader(layout, part)
    done = [] if reader is None else _intact_blocks(job, reader, blocks)
    if not done:
        _make_anew(part)
    earlier = done[-1]["seconds"] if done else 0.0
    known = {name: digest for block in done for name, digest in block["checksums"].items()}
    with (
        CheckpointWriter(job.index, layout, part, known, job.device) as writer,
        # Refinement may change gains of norms until the end; all else that is not rounded can be copied at any time.
        BackgroundWriter(writer, copies_ahead=not job.config.refine_steps) as sink,
    ):

        def keep(spec: BlockSpec, found: Findings) -> None:
            seconds = earlier + time.perf_counter() - start

            def record(written: dict[str, str]) -> None:
                checksums = {name: digest for name, digest in written.items() if name not in known}
                known.update(checksums)
                blocks.save(str(spec.index), vars(found) | {"checksums": checksums, "seconds": seconds})

            sink.when_written(record)  # what is recorded must be in the files

        known_findings = [Findings(block["layers"], block["refinement"]) for block in done]
        states = blocks.part("states") if context.ranks.size == 1 else NOTHING_SAVED  # each rank has others
        finished = Finished(reader, known_findings, states, keep)
        stage = "rounding and refining" if job.config.refine_steps else "rounding"
        progress = partial(context.reporter.progress, f"{stage} {shown_plan(label)}")
        if rows is None:
            found = round_weights(job, plan.formats, sink, progress, finished)
        else:
            if not job.config.refine_steps or can_share(rows.tokens, context.ranks):
                _share_rows(context, rows)
                job = context.shared(_round_along, plan.formats, part, [list(block["refinement"]) for block in done])
            found = round_blocks(job, plan.formats, rows, sink, progress, finished=finished)
        for table in job.tables:
            weight = TensorReader(job.index, device=job.device).tensor(table.tensor)
            for name, tensor in table_tensors(table, weight.to(job.device)).items():
                sink.write_tensor(name, tensor)
        for name, tensor in (rows.cache_scales if rows is not None else {}).items():
            sink.write_tensor(name, tensor)
    return Written(writer.checksums, sorted(writer.changed), found.layers, found.refinement, earlier)


class _Discarded:
    """Takes what rounding changes where the leader writes it."""

    def write_layer(self, layer: RoundedLayer) -> None:
        """Nothing."""

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """Nothing."""


def _round_along(job: Job, formats: UnitFormats, part: Path, done: Sequence[Sequence[str]]) -> None:
    """A rank's share of a rounding; the leading blocks that are done it reads from the unfinished files.

    Of each of these it is told its name where it was refined.
    """
    reader = unfinished_reader(job.layout(formats), part) if done else None
    finished = Finished(reader, [Findings(refinement=dict.fromkeys(names)) for names in done])
    round_blocks(job, formats, job.ranks.kept[_ROWS], _Discarded(), lambda *_: None, finished=finished)


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


def _write_records(
    job: Job,
    plan: BitPlan,
    folder: Path,
    written: Written,
    total_bytes: int,
) -> None:
    config = target_config(job, plan.formats)
    rotation, stacks = job.index.rotation, {name: vars(stack) for name, stack in job.index.stacks.items()}
    write_config(job.index.folder, folder, config, untied=rotation is not None)
    more: dict[str, Any] = {"total_bytes": total_bytes, "transformers_obstacle": job.structure.obstacle}
    more |= {"stacked_experts": stacks} if stacks else {}
    more |= {"rotation": rotation.record()} if rotation is not None else {}
    more |= {"kv_cache": cache_record(job.caches, job.config.kv_cache)} if job.caches else {}
    reproduce = folder / "reproduce"
    reproduce.mkdir(exist_ok=True)
    write_json(reproduce / "plan.json", plan_document(plan, job.units, other_linears(job, plan.formats)) | more)
    errors = {name: values["weight_error"] for name, values in written.layers.items()}
    record = {"tensors": written.checksums, "weight_error": errors, "changed": written.changed}
    write_json(reproduce / "checksums.json", record)
