"""Walk a model block by block, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hawqtool.checkpoint.prefetch import Prefetcher
from hawqtool.checkpoint.reader import check_all_finite
from hawqtool.errors import InputError
from hawqtool.formats.activations import ActivationFormat
from hawqtool.model.block import BlockCall, LoadedBlock
from hawqtool.model.carried.walk import CarriedWalk
from hawqtool.model.discovery import Structure
from hawqtool.model.inputs.arguments import model_inputs
from hawqtool.model.replay import replayed_blocks
from hawqtool.model.skeleton import to_meta
from hawqtool.model.stored_names import stored_buffers
from hawqtool.model.tasks import model_task, row_outputs
from hawqtool.records import TokenImportance
from hawqtool.rounding.statistics import GroupStatistics, is_held_out, second_moments
from hawqtool.runtime.malloc import kept_pages, release_freed_pages
from hawqtool.runtime.stage_timer import UNRECORDED, Recorder
from hawqtool.runtime.store import NOTHING_SAVED, Saved
from hawqtool.streaming.block import Activations, advance, each_row
from hawqtool.streaming.converted import ConvertedSource, WeightSource
from hawqtool.streaming.offload import OffloadedBatches, StreamMemory
from hawqtool.streaming.resume_points import ResumePoints
from hawqtool.streaming.rounded_cache import CacheRounding
from hawqtool.streaming.rounded_inputs import rounded_inputs

_POSITIONS = 128
"""Positions of a row whose logits a CPU holds at a time (25 MB a copy of 49,152 classes): 64 took a quarter longer."""

_POSITIONS_OF_ROWS = 2048
"""Positions whose logits a GPU holds at a time where rows are short: for each call alone the host would be late."""

_BLOCKS_BETWEEN_TRIMS, BLOCKS_AHEAD = 6, 2
"""Blocks of a walk on a CPU after which the heap is trimmed (at each it would take a tenth of the time), and those
whose weights are read while one is walked."""

_LARGE_BLOCK = 500_000_000
"""Weights of a block above which one alone is read ahead: page-locked memory holds what is."""

_ROWS_COMPARED = 4096
"""Rows of a matrix that are compared at a time."""


class ModelStream:
    """A model whose blocks are loaded when they are walked and dropped afterwards.

    Args:
        model: Skeleton, every parameter on meta.
        structure: Its discovered structure.
        source: Where the weights come from.
        device: Where to compute.
        dtype: dtype of weights and activations while computing.
        memory: Where it keeps what is no block's.
        recorder: Takes note of the stages of walks.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        memory: StreamMemory | None = None,
        recorder: Recorder = UNRECORDED,
    ) -> None:
        self.model: Any = model
        self.structure, self.recorder = structure, recorder
        self.source = ConvertedSource(source, structure.conversions, model) if structure.conversions else source
        self.task = model_task(model)
        self.device, self.dtype = device, dtype
        memory = memory or StreamMemory()
        self.offload, self._matrices, self._owns = memory.offload, memory.matrices, memory.owns
        self._last_index: int | None = None
        self.input_formats: Mapping[str, ActivationFormat] = {}  # of linears whose engine rounds their inputs
        self.cache = CacheRounding()
        self.blocks = [model.get_submodule(spec.name) for spec in structure.blocks]
        to_meta(model)
        self._load_ends()
        self._load_buffers()
        for name, buffer in model.named_buffers():
            if buffer.device.type == "meta":
                raise InputError(
                    f"buffer {name} is stored nowhere and cannot be rebuilt; this architecture is not supported"
                )
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        flow = structure.flow
        self._carried = None if flow is None else CarriedWalk(model, flow, self._inputs, self._module)

    def _places(
        self, module: nn.Module, prefix: str, skip: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, list[tuple[str, nn.Module, str]]]]:
        """Stored name of each parameter with the places that share it."""
        aliases: dict[int, list[tuple[str, nn.Module, str]]] = {}
        unused = () if prefix else self.structure.unused
        for path, owner in module.named_modules():
            for leaf, parameter in owner._parameters.items():
                name = f"{path}.{leaf}" if path else leaf
                if parameter is not None and not name.startswith(skip) and name not in unused:
                    tensor = self.structure.stored_names.get(prefix + name, prefix + name)
                    aliases.setdefault(id(parameter), []).append((tensor, owner, leaf))
        for places in aliases.values():
            stored = next((name for name, _, _ in places if name in self.source), None)
            if stored is None:
                raise InputError(
                    f"{places[0][0]} is not in the checkpoint; the model that config.json describes needs it"
                )
            yield stored, places

    def _load_ends(self) -> None:
        """Load what lies outside the blocks: embedding, last norm, head."""
        if isinstance(self.source, Prefetcher | ConvertedSource):  # several at a time, as they are large
            known = self._matrices if self._matrices is not None and self._owns else {}
            places = self._places(self.model, "", self.structure.inside)
            self.source.expect([stored for stored, _ in places if stored not in known], pinned=False)
        self._load(self.model, "", skip=self.structure.inside, shared=self._matrices)
        self._has_ends = True
        for path, model in self.model.named_modules():
            first = next(model.named_parameters(), None) if isinstance(model, PreTrainedModel) else None
            if first is None:
                continue
            name, parameter = f"{path}.{first[0]}" if path else first[0], first[1]
            if name in self.structure.unused:
                # By its device transformers knows that of a model; zeros of any shape take the memory of one.
                owner, _, leaf = name.rpartition(".")
                zeros = torch.zeros((), dtype=parameter.dtype, device=self.device).expand(parameter.shape)
                self.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)

    def _load_buffers(self) -> None:
        """Load the stored buffers of the whole model, such as routing biases and scalars of layers; they are small.

        Floating ones get the dtype in which transformers computes with them.

        Raises:
            InputError: If the checkpoint lacks a block's of floating point, or has another shape of one.
        """
        exact = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        for name, buffer in list(stored_buffers(self.model)):
            stored = self.structure.stored_names.get(name, name)
            if stored not in self.source:
                if buffer.is_floating_point() and name.startswith(self.structure.inside):
                    raise InputError(f"buffer {name} is not in the checkpoint; the model of config.json needs it")
                continue  # indices, which the constructor has computed, and parts that no row reaches
            value = self.source.tensor(stored)
            if value.shape != buffer.shape:
                raise InputError(
                    f"{stored} has shape {tuple(value.shape)} in the file, config.json implies {tuple(buffer.shape)}"
                )
            if value.is_floating_point():
                # Infinite ones are no damage: ranges that clip nothing.
                value = value.to(torch.float32 if any(part in name for part in exact) else buffer.dtype)
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = value

    def _need_ends(self) -> None:
        if not self._has_ends:
            self._load_ends()

    def release_ends(self) -> None:
        """Let a CPU's memory have what lies outside the blocks until it is needed again: a walk does without it.

        On a GPU it stays, where reading it again would take longer than its room is worth; so does a head that is
        quantized, which is replaced in place.
        """
        needed = self.structure.head is not None or (self._carried is not None and self._carried.needs_ends)
        if self.device.type == "cpu" and not needed:
            to_meta(self.model)
            self._has_ends = False

    def _load(
        self,
        module: nn.Module,
        prefix: str,
        skip: tuple[str, ...] = (),
        shared: MutableMapping[str, nn.Parameter] | None = None,
    ) -> None:
        loaded: dict[str, Tensor] = {}
        for stored, places in list(self._places(module, prefix, skip)):
            parameter = None if shared is None else self._known(stored, shared)
            if parameter is None:
                # First to the device, then to the dtype: fewer bytes travel.
                value = self.source.tensor(stored).to(self.device, non_blocking=True).to(self.dtype)
                loaded[stored] = value
                parameter = nn.Parameter(value, requires_grad=False)
                if shared is not None and self._owns and value.ndim > 1:
                    shared[stored] = parameter
            for _, owner, leaf in places:
                owner._parameters[leaf] = parameter
        check_all_finite(loaded)

    def _known(self, stored: str, shared: MutableMapping[str, nn.Parameter]) -> nn.Parameter | None:
        """The shared matrix of that name, if the source of this stream has the same."""
        parameter = shared.get(stored)
        if parameter is None or self._owns:
            return parameter
        value = self.source.tensor(stored)
        if value.shape != parameter.shape:
            return None
        # A part at a time: a copy of the whole is what sharing is to save.
        parts = zip(parameter.split(_ROWS_COMPARED), value.split(_ROWS_COMPARED), strict=True)
        return parameter if all(torch.equal(known, part.to(known)) for known, part in parts) else None

    @contextmanager
    def block(
        self, index: int, following: Sequence[int] | None = None, without: Sequence[str] = ()
    ) -> Iterator[LoadedBlock]:
        """The block with its weights loaded; they are dropped when the context ends.

        Args:
            index: Its number.
            following: Blocks that will be asked for next (default: those in the direction of the walk).
            without: Parameters inside the block that others take the place of; so they are not read.
        """
        module = self.blocks[index]
        with self.recorder.stage("load"):
            self._load(module, self.structure.inside[index], skip=tuple(without))
        self._expect_after(index) if following is None else self._expect(following)
        loaded = LoadedBlock(module, self.structure.blocks[index])
        try:
            with rounded_inputs(loaded, self.input_formats), self.cache.applied(loaded):
                yield loaded
        finally:
            to_meta(module)
            if self.device.type == "cpu" and index % _BLOCKS_BETWEEN_TRIMS == 0:
                release_freed_pages()

    @property
    def head(self) -> LoadedBlock | None:
        """The whole model as the block of its output head, where that is quantized."""
        return None if self.structure.head is None else LoadedBlock(self.model, self.structure.head)

    def keeping_pages(self) -> AbstractContextManager[None]:
        """A context for sweeps over many batches, in which a CPU's heap keeps what is freed (see `kept_pages`)."""
        return kept_pages() if self.device.type == "cpu" else nullcontext()

    def _expect_after(self, index: int) -> None:
        """Have the next blocks' weights read ahead where the source can: the walk goes on the way it came.

        A block that is walked twice in a row is one where it turned. One thread hashes a matrix for longer than a GPU
        needs for a block of few rows, so that one block alone ahead would set the pace.
        """
        step = -1 if self._last_index in (index, index + 1) else 1
        self._last_index = index
        large = sum(linear.num_weights for linear in self.structure.blocks[index].linears) > _LARGE_BLOCK
        self._expect([index + step * ahead for ahead in range(1, 2 if large else BLOCKS_AHEAD + 1)])

    def _expect(self, indices: Sequence[int]) -> None:
        """Have the weights of blocks read ahead, as far as there are such blocks."""
        if isinstance(self.source, Prefetcher | ConvertedSource):
            inside = [i for i in indices if 0 <= i < len(self.blocks)]
            places = [self._places(self.blocks[i], self.structure.inside[i]) for i in inside]
            self.source.expect([stored for of_block in places for stored, _ in of_block])

    def embed(
        self,
        rows: Tensor,
        batch_size: int,
        held_out: bool = False,
        with_original: bool = False,
        importance: TokenImportance | None = None,
    ) -> Activations:
        """Run what comes before the first block on ``rows``: ``[rows, seq_len]`` tokens, or images.

        The others say what else statistics shall hold (see `Activations`); what comes before the blocks is never
        rounded, so that the original's states begin as these do.
        """
        self._need_ends()
        self._expect(range(BLOCKS_AHEAD))
        hidden: MutableSequence[Tensor] = [] if self.offload is None else OffloadedBatches(self.offload)
        calls: list[list[BlockCall]] = []
        for part in rows.split(batch_size):
            first, of_blocks = self._begin(part)
            hidden.append(first)
            calls.append(of_blocks)
        original = copy(hidden) if with_original else None
        return Activations(hidden, calls, original, held_out, self.recorder, importance)

    def _begin(self, rows: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """State before the first block, and the calls of all blocks."""
        if self._carried is not None:
            first, calls = self._carried.begin(rows)
            return first, [*calls]
        ended = replayed_blocks(self._list, self.structure.extra_outputs, ends=True)
        with ended as recorded, torch.no_grad():
            self.model(**self._inputs(rows))
        return recorded[0][0][0], [(args[1:], kwargs) for args, kwargs in recorded]

    @property
    def _list(self) -> Any:
        """The list of blocks of a model that has one."""
        return self.model.get_submodule(self.structure.blocks[0].name.rpartition(".")[0])

    @contextmanager
    def _module(self, index: int) -> Iterator[nn.Module]:
        with self.block(index) as block:
            yield block.module

    def state_growth(self, rows: Tensor) -> float:
        """Mean size of the state before a block, in that of the one before the first; more where more is carried."""
        return 1.0 if self._carried is None else self._carried.growth(rows)

    def outputs(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """What the model is judged by, from the last block's output through the model's own head.

        Returns:
            As `row_outputs`.
        """
        self._need_ends()
        if self._carried is not None:
            result = self._carried.outputs(rows, hidden)
        else:
            with replayed_blocks(self._list, self.structure.extra_outputs, output=hidden):
                result = self.model(**self._inputs(rows))
        return row_outputs(self.model, result)

    def output_parts(self, positions: int, most: int = _POSITIONS) -> list[slice]:
        """Positions of a row whose outputs are computed together: on a CPU some, because logits outweigh all else."""
        together = most if self.task.generates and self.device.type == "cpu" else positions
        return [slice(first, min(first + together, positions)) for first in range(0, positions, together)]

    def rows_together(self, positions: int) -> int:
        """Rows of so many positions whose outputs are computed together where each row's are wanted whole."""
        return max(1, _POSITIONS_OF_ROWS // positions) if self.device.type == "cuda" else 1

    def head_inputs(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Inputs ``[tokens, width]`` of the output head, from the last block's output."""
        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].flatten(0, -2)))
        try:
            self.outputs(rows, hidden)
        finally:
            hook.remove()
        return seen[0]

    def head_statistics(self, rows: Tensor, activations: Activations) -> GroupStatistics:
        """Second moments of the head's inputs over all batches; rows go one by one, because logits are large."""
        states, first = each_row(activations.hidden), activations.first_row
        originals = repeat(None, len(rows)) if activations.original is None else each_row(activations.original)
        total: GroupStatistics | None = None
        with torch.no_grad():
            for number, (row, state, other) in enumerate(zip(rows, states, originals, strict=True)):
                x = self.head_inputs(row[None], state[None])
                held = is_held_out(torch.full((len(x),), first + number)) if activations.held_out else None
                original = None if other is None else self.head_inputs(row[None], other[None])
                with self.recorder.stage("gram"):
                    found = second_moments(x, len(x), held, original)
                if total is None:
                    total = found
                else:
                    total += found
        assert total is not None  # there are rows
        return total

    def _inputs(self, rows: Tensor) -> dict[str, Tensor]:
        # Taken apart first: tokens of joined rows are exact in float32 alone.
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in model_inputs(self.model, rows).items()
        }

    def final_hidden(
        self, rows: Tensor, batch_size: int, progress: Callable[[int], None], saved: Saved = NOTHING_SAVED
    ) -> Tensor:
        """Output of the last block for all rows, ``[rows, positions, width]``; an interrupted walk is gone on with."""
        return self.final_states({"hidden": rows}, batch_size, progress, saved)["hidden"]

    def final_states(
        self,
        sets: Mapping[str, Tensor],
        batch_size: int,
        progress: Callable[[int], None],
        saved: Saved = NOTHING_SAVED,
    ) -> dict[str, Tensor]:
        """`final_hidden` of several sets of rows by name, in one walk: reading a block may take longer than a set."""
        walked = {name: self.embed(rows, batch_size) for name, rows in sets.items()}
        self.release_ends()
        states = {name: activations.hidden for name, activations in walked.items()}
        resume_points = ResumePoints(saved, self.device)
        first = resume_points.restore(states, len(self.blocks))
        for spec in self.structure.blocks[first:]:
            with self.block(spec.index) as block:
                for activations in walked.values():
                    advance(block, activations)
            resume_points.keep(spec.index + 1, states)
            progress(spec.index)
        return {name: torch.cat(list(hidden)) for name, hidden in states.items()}
