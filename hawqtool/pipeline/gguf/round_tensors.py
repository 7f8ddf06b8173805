"""Rounding of a planned GGUF file: block by block on the quantized prefix, straight into the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockFields, block_grid, grid_values, pack_blocks
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputError
from hawqtool.export.gguf.writer import GgufWriter
from hawqtool.export.packed_reader import relative_weight_error
from hawqtool.model.block import LoadedBlock
from hawqtool.pipeline.gguf.ends import EndRounding
from hawqtool.pipeline.gguf.planner import types_of
from hawqtool.pipeline.gguf.tensors import GgufJob
from hawqtool.pipeline.run.context import RunContext
from hawqtool.records import BitPlan, Rows
from hawqtool.rounding.blocks.spec import BlockRounding
from hawqtool.rounding.spec import InputGroups
from hawqtool.streaming.input_statistics import collect_statistics
from hawqtool.streaming.resume_points import ResumePoints


@dataclass
class Findings:
    """What the record says of rounded matrices.

    Args:
        output_errors: Squared error of outputs over squared outputs, by linear.
        weight_errors: Squared error over squared weights, by the checkpoint's tensor.
        plain: Linears that were rounded to nearest, as held-out rows wanted it.
    """

    output_errors: dict[str, float] = field(default_factory=dict)
    weight_errors: dict[str, float] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take those of other matrices."""
        self.output_errors |= other.output_errors
        self.weight_errors |= other.weight_errors
        self.plain += other.plain


class GgufRounder:
    """Rounds what a plan says into a file, and keeps finished blocks for a run that resumes.

    Args:
        context: The run; its store keeps findings and hidden states of this file.
        gguf: The job.
        plan: Types by unit.
        ends: How embedding and output are rounded.
        writer: Writer of the file, which holds what an earlier run finished.
    """

    def __init__(
        self, context: RunContext, gguf: GgufJob, plan: BitPlan, ends: EndRounding, writer: GgufWriter
    ) -> None:
        self._context, self._gguf, self._types, self._ends = context, gguf, types_of(plan), ends
        self._writer, self._latest, self.findings = writer, Findings(), Findings()
        one_each = {unit.name: (plan.formats[unit.name],) for unit in gguf.job.units}
        self._rounding = BlockRounding(gguf.job.settings.method, one_each, gguf.job.stored_dtypes)

    def run(self, calibration: Rows | None) -> Findings:
        """Round and write everything.

        Raises:
            InputError: If there are no rows.
        """
        if calibration is None:
            raise InputError("no calibration rows; expected some, as rounding to block types needs inputs; run again")
        known = self._finished("ends")
        if known is None:
            self._round_ends()
            self._keep("ends")
        else:
            self._take(known)
        self._round_blocks(calibration)
        return self.findings

    def _finished(self, key: str) -> Findings | None:
        """What an earlier run found under a key, if its tensors are in the file as it wrote them."""
        known = self._context.saved.load(key) if self._writer.resumed else None
        if known is None:
            return None
        found = Findings(**known["findings"])
        if self._writer.digest(self._tensors(found)) != known["digest"]:
            self._context.reporter.warn(f"{self._writer.path.name}: what an earlier run wrote of {key} is damaged")
            return None
        return found

    def _finished_blocks(self, count: int) -> Iterator[Findings]:
        """Findings of the leading blocks that an earlier run finished."""
        for number in range(count):
            found = self._finished(_key(number))
            if found is None:
                return
            yield found

    def _tensors(self, findings: Findings) -> set[str]:
        return {self._gguf.places[name].tensor for name in findings.weight_errors}

    def _take(self, findings: Findings) -> None:
        self._writer.take_over(self._tensors(findings))
        self.findings.add(findings)

    def _keep(self, key: str) -> None:
        self._writer.sync()  # what is kept says that it is there
        digest = self._writer.digest(self._tensors(self._latest))
        self._context.saved.save(key, {"findings": asdict(self._latest), "digest": digest})
        self.findings.add(self._latest)
        self._latest = Findings()

    def _round_ends(self) -> None:
        gguf, reader = self._gguf, TensorReader(self._gguf.job.index)
        for name, place in gguf.places.items():
            if place.tensor in gguf.ends:
                weight, kind = gguf.matrix(name, reader).float().to(gguf.job.device), self._types[place.tensor]
                self._write(name, weight, self._ends.rounded(place.tensor, weight, kind), kind)

    def _round_blocks(self, calibration: Rows) -> None:
        job, method = self._gguf.job, self._gguf.job.settings.method
        stream, blocks = job.stream(), job.structure.blocks
        activations = stream.embed(
            *(calibration.tokens, job.settings.batch_size, method.compensates, method.needs_drift),
            calibration.importance,
        )
        stream.release_ends()
        progress = self._context.progress("rounding")
        points = ResumePoints(self._context.part("walk").saved, job.device)
        finished = [*self._finished_blocks(len(blocks))]
        first = points.restore(activations.states, len(finished))
        for found in finished[:first]:
            self._take(found)
        for spec in blocks[first:]:
            with stream.block(spec.index) as block:
                collect_statistics(block, activations, partial(self._visit, block))
            self._keep(_key(spec.index))
            points.keep(spec.index + 1, activations.states)
            progress(spec.index + 1, len(blocks))
        if stream.head is not None:
            statistics = stream.head_statistics(calibration.tokens, activations)
            self._visit(stream.head, [(stream.head.spec.input_groups[0], statistics)])
            self._keep("head")

    def _visit(self, block: LoadedBlock, groups: InputGroups) -> None:
        for group, statistics in groups:
            linears = {linear.name: linear for linear in group}
            for layer, weight in self._rounding.layers(block, group, statistics):
                self._write(f"{layer.name}.weight", weight, layer.fields, layer.kind)
                self._latest.output_errors[layer.name] = layer.output_error
                if self._rounding.method.compensates and not layer.compensated:
                    self._latest.plain.append(layer.name)
                block.set_weight(linears[layer.name], layer.values)

    def _write(self, name: str, weight: Tensor, fields: BlockFields, kind: BlockType) -> None:
        """Pack rows in the template's order and write them.

        Args:
            name: Name of the checkpoint's tensor.
            weight: ``[out, in]``, what was rounded.
            fields: What it became.
            kind: Type of the blocks.
        """
        place, stored = self._gguf.places[name], pack_blocks(fields, kind)
        restored = grid_values(fields.codes, block_grid(fields, kind), kind)
        self._latest.weight_errors[name] = relative_weight_error(weight, restored)
        if place.piece.rows is not None:
            stored = stored[place.piece.rows.to(stored.device)]
        self._writer.write(place.tensor, stored, place.first_row)


def _key(block: int) -> str:
    return f"block-{block}"
