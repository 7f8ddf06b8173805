"""Embedding and output as units of the plan: what each loses in each type, measured with all else original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockFields, block_grid, grid_values
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.pipeline.gguf.tensors import OUTPUT, GgufJob
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.records import Rows, Score, UnitScores
from hawqtool.rounding.blocks.spec import round_alone, round_blocks
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.sensitivity.measured_kl import pairs_of_scores, scores_of_pairs
from hawqtool.streaming.block import Activations

FIT_ROWS = 16
"""Most calibration rows behind the Gram matrix of the output's inputs: thousands of tokens for one matrix."""

_SAVED = "ends"
_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class EndRounding:
    """How embedding and output are rounded.

    Args:
        scores: What each type of each tensor loses, nats per token; none of tensors that have one type.
        compensated: Types by tensor in which it loses less with compensation for the output's inputs than rounded by
            itself.
        gram: ``[in, in]`` float32, mean of x xᵀ of the output's inputs; None where nothing is compensated.
        num_tokens: Tokens behind it.
    """

    scores: UnitScores = field(default_factory=dict)
    compensated: Mapping[str, Sequence[str]] = field(default_factory=dict)
    gram: Tensor | None = None
    num_tokens: int = 0

    def rounded(self, tensor: str, weight: Tensor, kind: BlockType) -> BlockFields:
        """Codes and stored scales of a matrix.

        Args:
            tensor: Name of the tensor.
            weight: ``[out, in]`` float32 on the device.
            kind: Its type.

        Raises:
            NumericalError: If the result is not finite.
        """
        if self.gram is None or kind.name not in self.compensated.get(tensor, ()):
            return round_alone(tensor, weight, kind)
        factor = factorize(self.gram.to(weight.device), self.num_tokens, name=tensor)
        return _compensated(weight, factor, kind)


def measure_ends(context: RunContext, gguf: GgufJob, calibration: Rows, scoring: Rows) -> EndRounding:
    """Measure every type of embedding and output that there is a choice of.

    The model is run with one matrix rounded, in each of its types; what its outputs differ by is in the unit of the
    other scores. A matrix that makes the outputs, as a tied embedding does, is rounded to nearest and with
    compensation for its inputs, and the better way counts.

    Args:
        context: The run; its store keeps the result.
        gguf: The job.
        calibration: Rows behind the Gram matrix.
        scoring: Rows to measure on.
    """
    choices = {name: gguf.menu[name] for name in gguf.ends if len(gguf.menu[name]) > 1}
    if not choices:
        return EndRounding()
    known = context.saved.load(_SAVED)
    if known is None:
        found = _measured(context, gguf, choices, (calibration, scoring))
        known = {**vars(found), "scores": pairs_of_scores(found.scores)}
        context.saved.save(_SAVED, known)
    return EndRounding(**{**known, "scores": scores_of_pairs(known["scores"])})


def _measured(
    context: RunContext, gguf: GgufJob, choices: Mapping[str, Sequence[BlockType]], rows: tuple[Rows, Rows]
) -> EndRounding:
    (calibration, scoring), job, reader = rows, gguf.job, TensorReader(gguf.job.index)
    if job.dtype != torch.float32:  # in bfloat16 roundings on the way lose as much as the better types do
        job = replace(job, dtype=torch.float32, matrices=WeakValueDictionary())
    fitting = replace(calibration, tokens=calibration.tokens[:FIT_ROWS])
    evaluator = Evaluator(RunContext(job), {"fitting": fitting, "scoring": scoring})
    gram, tokens = _head_gram(evaluator, fitting.tokens)
    factor = None if gram is None else factorize(gram, tokens, name="the output's inputs")
    names = {place.tensor: name for name, place in gguf.places.items()}
    scores: UnitScores = {}
    compensated: dict[str, list[str]] = {}
    done, total = 0, sum(map(len, choices.values()))
    for tensor, kinds in choices.items():
        weight = gguf.matrix(names[tensor], reader).float().to(job.device)
        makes_outputs = tensor == OUTPUT or OUTPUT not in gguf.template.tensors
        scores[tensor] = {}
        for kind in kinds:
            tries = _tries(tensor, weight, kind, factor if makes_outputs else None)
            losses = []
            for fields in tries:
                values = grid_values(fields.codes, block_grid(fields, kind), kind)
                stream = job.stream(_Replaced(reader, names[tensor], values, gguf.places[names[tensor]].transposed))
                losses.append(evaluator.compare(stream, f"{tensor} as {kind.name}", "scoring"))
            best = min(range(len(losses)), key=lambda index: losses[index].divergence)
            scores[tensor][kind.name] = Score(max(0.0, losses[best].divergence), losses[best].stderr)
            if best:
                compensated.setdefault(tensor, []).append(kind.name)
            done += 1
            context.progress("embedding and output")(done, total)
    return EndRounding(scores, compensated, None if gram is None else gram.cpu(), tokens)


def _tries(tensor: str, weight: Tensor, kind: BlockType, factor: Factor | None) -> Iterator[BlockFields]:
    yield round_alone(tensor, weight, kind)
    if factor is not None:
        yield _compensated(weight, factor, kind)


def _compensated(weight: Tensor, factor: Factor, kind: BlockType) -> BlockFields:
    """Rounding for known inputs, so many rows at a time as memory is meant to take."""
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    found = [round_blocks(part, factor.diagonal, factor, kind) for part in weight.split(rows)]
    parts = (None if part[0] is None else torch.cat(part) for part in zip(*found, strict=True))
    return BlockFields(*parts)  # type: ignore[arg-type]


def _head_gram(evaluator: Evaluator, rows: Tensor) -> tuple[Tensor | None, int]:
    """Gram matrix of the original's last states as its output takes them, and their tokens; None without an output."""
    if evaluator.job.skeleton.get_output_embeddings() is None:
        return None, 0
    statistics = evaluator.stream.head_statistics(rows, Activations([evaluator.reference["fitting"]], []))
    return statistics.gram, statistics.num_tokens


class _Replaced:
    """A checkpoint one of whose matrices is another."""

    def __init__(self, reader: TensorReader, name: str, values: Tensor, transposed: bool) -> None:
        self._reader, self._name = reader, name
        self._values = values.t().contiguous() if transposed else values

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def tensor(self, name: str) -> Tensor:
        return self._values if name == self._name else self._reader.tensor(name)
