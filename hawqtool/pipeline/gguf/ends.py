"""Embedding and output as units of the plan: what each loses in each type, measured with all else original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import BlockFields, block_grid, grid_values
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.evaluation.divergence import OutputComparison
from hawqtool.pipeline.gguf.tensors import OUTPUT, GgufJob
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.records import Rows, Score, UnitScores
from hawqtool.rounding.blocks.spec import round_alone, round_blocks
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.runtime.malloc import release_freed_pages
from hawqtool.sensitivity.measured_kl import finite, pairs_of_scores, scores_of_pairs
from hawqtool.sensitivity.scores import mean_score
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
    trials = _EndTrials(gguf, *rows)
    scores: UnitScores = {}
    compensated: dict[str, list[str]] = {}
    done, total = 0, sum(map(len, choices.values()))
    for tensor, kinds in choices.items():
        scores[tensor] = {}
        for label, tries in trials.losses(tensor, kinds):
            best = min(range(len(tries)), key=lambda index: tries[index].value)
            scores[tensor][label] = replace(tries[best], value=max(0.0, tries[best].value))
            if best:
                compensated.setdefault(tensor, []).append(label)
            done += 1
            context.progress("embedding and output")(done, total)
    gram = trials.gram
    return EndRounding(scores, compensated, None if gram is None else gram.cpu(), trials.num_tokens)


class _EndTrials:
    """Runs a model with its embedding or its output rounded, and with no more of it than that changes.

    Args:
        gguf: The job.
        calibration: Rows behind the Gram matrix.
        scoring: Rows to measure on.
    """

    def __init__(self, gguf: GgufJob, calibration: Rows, scoring: Rows) -> None:
        self._gguf, job = gguf, gguf.job
        if job.dtype != torch.float32:  # in bfloat16 roundings on the way lose as much as the better types do
            job = replace(job, dtype=torch.float32, matrices=WeakValueDictionary())
        self._job, self._reader = job, TensorReader(job.index)
        self._names = {place.tensor: name for name, place in gguf.places.items()}
        fitting = replace(calibration, tokens=calibration.tokens[:FIT_ROWS])
        self._evaluator = Evaluator(RunContext(job), {"fitting": fitting, "scoring": scoring})
        self._tokens, self._states = scoring.tokens, self._evaluator.reference["scoring"]
        self.gram, self.num_tokens = _head_gram(self._evaluator, fitting.tokens)
        self._factor = None
        if self.gram is not None:
            self._factor = factorize(self.gram, self.num_tokens, name="the output's inputs")

    def losses(self, tensor: str, kinds: Sequence[BlockType]) -> Iterator[tuple[str, list[Score]]]:
        """Each type with what its roundings lose, nats per token: to nearest, and compensated where that is tried.

        Raises:
            NumericalError: If a rounding or an output is not finite.
        """
        weight = self._gguf.matrix(self._names[tensor], self._reader).float().to(self._job.device)
        if tensor != OUTPUT and OUTPUT in self._gguf.template.tensors:
            yield from self._looked_up(tensor, weight, kinds)
            return
        for kind in kinds:
            yield kind.label, self._making_outputs(tensor, weight, kind)

    def _looked_up(self, tensor: str, weight: Tensor, kinds: Sequence[BlockType]) -> Iterator[tuple[str, list[Score]]]:
        """`losses` of a matrix of which the model reads the rows of its tokens alone."""
        seen = self._tokens.unique().to(weight.device)
        found = {}
        for kind in kinds:
            fields, values = round_alone(tensor, weight[seen], kind), weight.clone()
            values[seen] = grid_values(fields.codes, block_grid(fields, kind), kind)
            found[kind.label] = self._last_states(tensor, values, kind)
        divergences = self._comparison.divergences_by_parts(found)
        yield from ((label, [mean_score(rows)]) for label, rows in finite(tensor, divergences).items())

    def _making_outputs(self, tensor: str, weight: Tensor, kind: BlockType) -> list[Score]:
        """`losses` in one type of a matrix that makes the outputs, an embedding that is tied to them among these."""
        tries = [round_alone(tensor, weight, kind)]
        if self._factor is not None:
            tries.append(_compensated(weight, self._factor, kind))
        values = {str(n): grid_values(one.codes, block_grid(one, kind), kind) for n, one in enumerate(tries)}
        states = dict.fromkeys(values, self._states)
        if tensor != OUTPUT:
            states = {n: self._last_states(tensor, rounded, kind) for n, rounded in values.items()}
        divergences = self._comparison.divergences_by_parts(states, lambda n: self._with_output(values[n]))
        return [mean_score(rows) for rows in finite(f"{tensor} as {kind.name}", divergences).values()]

    @property
    def _comparison(self) -> OutputComparison:
        release_freed_pages()  # logits need other sizes than blocks do
        stream = self._evaluator.stream
        return OutputComparison(stream, stream, self._tokens, self._states)

    def _last_states(self, tensor: str, values: Tensor, kind: BlockType) -> Tensor:
        """Output of the last block where a matrix has other values."""
        name = self._names[tensor]
        source = _Replaced(self._reader, name, values, self._gguf.places[name].transposed)
        what = self._job.stream(source), f"{tensor} as {kind.name}", ("scoring",)
        return self._evaluator.last_states(*what)["scoring"]

    @contextmanager
    def _with_output(self, values: Tensor) -> Iterator[None]:
        """Other weights ``[out, in]`` of the output head, if there is one, while the context lasts."""
        head = self._evaluator.stream.model.get_output_embeddings()
        if head is None:
            yield
            return
        loaded, head._parameters["weight"] = head._parameters["weight"], values
        try:
            yield
        finally:
            head._parameters["weight"] = loaded


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
