"""A model with the template of its GGUF file: which tensors are quantized, to which types they may go, exact sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType, StoredType
from hawqtool.checkpoint.gguf.header import ARCHITECTURE_KEY, GgufHeader, GgufTensor, read_gguf
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.export.gguf.template import Match, match_template
from hawqtool.export.gguf.writer import GgufLayout, plan_gguf
from hawqtool.model.discovery import Structure
from hawqtool.pipeline.gguf.record import Place
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.records import BlockSpec, LinearSpec, Unit
from hawqtool.runtime.reporter import Reporter

LARGE_BLOCKS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Types to choose from where rows are whole blocks of 256."""

SMALL_BLOCKS = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types to choose from elsewhere; Q4_0 takes the bits of IQ4_NL and loses more."""

LARGE_ENDS = ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Types of embedding and output to choose from where rows are whole blocks of 256."""

SMALL_ENDS = ("IQ4_NL", "Q5_0", "Q8_0")
"""Types of embedding and output to choose from elsewhere; these matrices are large, and so few are tried."""

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

TypeMenu = Mapping[str, Sequence[BlockType]]
"""Types to choose from, by tensor."""


@dataclass(frozen=True)
class GgufJob:
    """A job whose units are tensors of a GGUF file.

    Args:
        job: The job; formats of its units are block types.
        template: Header of the template.
        menu: Types to choose from by unit, embedding and output among them.
        ends: Embedding and output as units, by name of tensor; the job has none of them.
        places: Where matrices lie, by the name of the checkpoint's tensor.
        kept: Matrices that stay as the template has them, with the reason.
    """

    job: Job
    template: GgufHeader
    menu: TypeMenu
    ends: Mapping[str, Unit]
    places: Mapping[str, Place]
    kept: Mapping[str, str]

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units of the plan."""
        return (*self.job.units, *self.ends.values())

    def layout(self, plan: Mapping[str, StoredType]) -> GgufLayout:
        """Exact bytes of the file for types by unit."""
        return plan_gguf(self.template, plan)

    def matrix(self, name: str, reader: TensorReader) -> Tensor:
        """A matrix of the checkpoint as ``[out, in]``."""
        return _matrix(name, self.job.structure, reader)


def prepare_gguf(config: RunConfig, reporter: Reporter, states: Path | None = None) -> GgufJob:
    """Read model and template, and find which tensor is which.

    Args:
        config: The run's configuration, with a template.
        reporter: Narration.
        states: Folder for hidden states that memory does not hold; None for a temporary one.

    Raises:
        UsageError: If a setting does not fit the model.
        InputError: If the template is damaged, or is not of this model.
    """
    assert config.template is not None  # the configuration's rules saw to it
    template = read_gguf(Path(config.template))
    if template.text(ARCHITECTURE_KEY) is None:
        raise InputError(f"{config.template} names no {ARCHITECTURE_KEY}; expected a model converted by llama.cpp")
    # Layers that transformers would keep apart are apart in GGUF as well.
    job = prepare(config.model_copy(update={"profile": "transformers"}), reporter, writes=False, states=states)
    reader = TensorReader(job.index)
    linears = {f"{name}.weight" for name in job.structure.linears}
    shapes = {n: _shape(n, job) for n, info in job.index.tensors.items() if len(info.shape) == 2}
    dtype = torch_dtype(job.index.tensors[next(iter(linears))].dtype)
    reporter.say(f"matching the tensors of {Path(config.template).name} with those of {job.source.name}")
    matches = match_template(template, shapes, lambda name: _matrix(name, job.structure, reader), dtype)
    allowed = {f"{member.name}.weight" for unit in job.units for member in unit.members}
    members = _members(matches, allowed)
    if not members:
        raise InputError(
            f"no tensor of {config.template} holds rows of {config.model}; expected its template: convert this model "
            "with llama.cpp's convert_hf_to_gguf.py --outtype bf16"
        )
    job = _with_units(job, members)
    end_types = _end_types(config, matches, members)
    ends = {name: _end_unit(matches[name]) for name in end_types}
    places = {
        piece.source: Place(name, number * match.tensor.shape[-2], piece, _is_transposed(piece.source, job.structure))
        for name, match in matches.items()
        if name in members or name in ends
        for number, piece in enumerate(match.pieces)
    }
    kept = _kept(template, matches, members, ends)
    return GgufJob(job, template, {**_menu(config, job.units), **end_types}, ends, places, kept)


def _matrix(name: str, structure: Structure, reader: TensorReader) -> Tensor:
    weight = reader.tensor(name)
    return weight.t().contiguous() if _is_transposed(name, structure) else weight


def _is_transposed(name: str, structure: Structure) -> bool:
    linear = structure.linears.get(name.removesuffix(".weight"))
    return linear is not None and linear.transposed


def _shape(name: str, job: Job) -> tuple[int, int]:
    first, second = job.index.tensors[name].shape
    return (second, first) if _is_transposed(name, job.structure) else (first, second)


def _members(matches: Mapping[str, Match], allowed: set[str]) -> dict[str, tuple[str, ...]]:
    """Linears of each tensor all of whose matrices are linears that may be quantized, none of them twice."""
    found, taken = dict[str, tuple[str, ...]](), set[str]()
    for name, match in matches.items():
        sources = [piece.source for piece in match.pieces]
        if set(sources) <= allowed - taken and len(set(sources)) == len(sources):
            found[name] = tuple(source.removesuffix(".weight") for source in sources)
            taken.update(sources)
    return found


def _with_units(job: Job, members: Mapping[str, Sequence[str]]) -> Job:
    """The job with one unit a tensor; linears of no tensor are left as they are."""
    unit_of = {linear: tensor for tensor, linears in members.items() for linear in linears}

    def named(linear: LinearSpec) -> LinearSpec:
        return replace(linear, unit=unit_of.get(linear.name, linear.unit))

    def regrouped(spec: BlockSpec) -> BlockSpec:
        return replace(spec, input_groups=tuple(tuple(map(named, group)) for group in spec.input_groups))

    head = job.structure.head
    structure = replace(
        job.structure, blocks=tuple(map(regrouped, job.structure.blocks)), head=regrouped(head) if head else None
    )
    units = tuple(unit for unit in structure.units if unit.name in members)
    return replace(job, structure=structure, units=units, pins={})


def _end_types(
    config: RunConfig, matches: Mapping[str, Match], members: Mapping[str, object]
) -> dict[str, tuple[BlockType, ...]]:
    """Types of embedding and output where they are to be quantized; one each where nothing is to be chosen.

    Raises:
        UsageError: If rows do not allow the type.
    """
    found = {}
    for name in (EMBEDDING, OUTPUT):
        if name in members or name not in matches or config.embedding_type == "keep":
            continue
        columns = matches[name].tensor.shape[-1]
        if config.embedding_type != "auto":
            kinds = [BLOCK_TYPES[config.embedding_type]]
            if not kinds[0].divides(columns):
                raise _undivided(f"--embedding-type {kinds[0].name}", name, columns)
        else:
            names = SMALL_ENDS if columns % 256 else LARGE_ENDS
            kinds = [BLOCK_TYPES[t] for t in names if BLOCK_TYPES[t].divides(columns)]
            if (config.target_bpw, config.target_size, config.target_kl) == (None, None, None):
                kinds = [kind for kind in kinds if kind.name in ("Q6_K", "Q8_0")][:1]
        if kinds:
            found[name] = tuple(kinds)
    return found


def _end_unit(match: Match) -> Unit:
    rows, columns = match.tensor.shape
    name = match.tensor.name
    linear = LinearSpec(match.pieces[0].source.removesuffix(".weight"), rows, columns, 0, name, 2)
    return Unit(name, (linear,))


def _menu(config: RunConfig, units: Sequence[Unit]) -> dict[str, tuple[BlockType, ...]]:
    """Types of each unit that divide its rows.

    Raises:
        UsageError: If a unit has none.
    """
    menu = {}
    for unit in units:
        columns = unit.members[0].in_features
        names = config.block_types or (SMALL_BLOCKS if columns % 256 else LARGE_BLOCKS)
        menu[unit.name] = tuple(BLOCK_TYPES[name] for name in names if BLOCK_TYPES[name].divides(columns))
        if not menu[unit.name]:
            raise _undivided(f"--block-types {','.join(names)}", unit.name, columns)
    return menu


def _undivided(option: str, tensor: str, columns: int) -> UsageError:
    fitting = [kind.name for kind in BLOCK_TYPES.values() if kind.divides(columns)]
    advice = f"add one of {', '.join(fitting)}" if fitting else "leave it as it is: --ignore its layer"
    return UsageError(f"{option} does not fit {tensor}, whose rows of {columns} weights are no whole blocks; {advice}")


def _kept(
    template: GgufHeader,
    matches: Mapping[str, Match],
    members: Mapping[str, object],
    ends: Mapping[str, object],
) -> dict[str, str]:
    """Why each other matrix stays as the template has it."""

    def reason(tensor: GgufTensor) -> str:
        if tensor.name not in matches:
            return "its rows are not those of any matrix of the checkpoint"
        return "--embedding-type keep" if tensor.name in (EMBEDDING, OUTPUT) else "not a linear that is quantized"

    matrices = (tensor for tensor in template.tensors.values() if len(tensor.shape) > 1)
    return {t.name: reason(t) for t in matrices if t.name not in members and t.name not in ends}
