"""What every stage needs to know of the model, from its config and headers alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from hawqtool.allocation.problem import ignored_along, matching_layers, resolve_ignored, resolve_pins
from hawqtool.allocation.roofline import names_hardware
from hawqtool.allocation.special_formats import check_formats
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.checkpoint.dtypes import torch_dtype
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.originals.recognition import left_unquantized
from hawqtool.checkpoint.prefetch import Prefetcher
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.checkpoint.rotated.codec import original_index
from hawqtool.checkpoint.source import ResolvedModel
from hawqtool.config import RunConfig
from hawqtool.data.tokenizer import load_tokenizer
from hawqtool.errors import InputError, UsageError
from hawqtool.export.embedding_table import EmbeddingTable, embedding_table, with_embedding_bits
from hawqtool.export.layout import Layout, plan_layout
from hawqtool.export.packed_reader import PackedReader
from hawqtool.formats.cache import KEY_LAYER, CachedAttention
from hawqtool.model.discovery import Structure
from hawqtool.model.experts import active_share, experts_per_token
from hawqtool.model.inputs.arguments import row_format, row_positions
from hawqtool.model.inputs.row_format import RowFormat
from hawqtool.model.skeleton import build_skeleton, max_positions
from hawqtool.model.stored_names import UNPACKED
from hawqtool.model.tasks import ModelTask, model_task
from hawqtool.model.vision import read_images
from hawqtool.pipeline.run.discovered import discover_checkpoint, find_source, stored_dtype
from hawqtool.pipeline.run.memory_budget import Work, choose_batch_size, copies_ahead, make_offload
from hawqtool.pipeline.run.resolved import ResolvedSettings, resolve_settings
from hawqtool.records import LayerFormats, Menu, Unit, UnitFormats
from hawqtool.rounding.spec import Refiner, RoundingSpec
from hawqtool.rounding.statistics import SETTINGS_HELD_OUT_EVERY
from hawqtool.runtime.background import BegunWork
from hawqtool.runtime.launched import local_rank, world_size
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.reporter import Reporter, Silent
from hawqtool.runtime.stage_timer import UNRECORDED, Recorder
from hawqtool.streaming.converted import WeightSource
from hawqtool.streaming.offload import Offload, StreamMemory
from hawqtool.streaming.rounded_cache import CacheRounding, cached_attentions
from hawqtool.streaming.stream import ModelStream

FEEDBACK_BYTES = 8 << 30
"""Most bytes of moments in the host's memory for output feedback that nobody asked for: an 8B model has 3.3 GB."""

JOINT_TOKENS = 64
"""Tokens beside an image or a sound where nothing is asked for: captions, and what is said in 10 s, are as short."""

FEEDBACK_ASPECT = 2
"""Most outputs per input of layers that ``--output-feedback auto`` takes: wider ones' moments, of gate and up, are the
largest, and they gain the least."""


class _Tokenizer:
    """A checkpoint's tokenizer, which takes a third of a second to load, for all threads of a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: Any = None

    def loaded(self, folder: Path, runs_code: bool) -> Any:
        with self._lock:
            if self._loaded is None:
                self._loaded = load_tokenizer(folder, runs_code)
            return self._loaded


@dataclass(frozen=True)
class Job:
    """A checkpoint ready to be worked on.

    Args:
        config: The run's configuration.
        settings: What it leaves to the device and the model, resolved.
        source: Where the checkpoint comes from.
        index: Headers of the checkpoint.
        skeleton: The model without weights; streams work on copies.
        structure: Blocks, linears, input groups.
        units: Units that are quantized; ignored ones are left out.
        pins: Unit name to its fixed format.
        left_units: Units that stay in 16 bits because a quantized original left them so.
        device: Where to compute.
        dtype: dtype of weights and activations while computing: float32 on a CPU.
        recorder: Takes note of the stages of walks; nothing by default.
        offload: Keeps hidden states between blocks; None where all stay on the device.
        rotation: Whether the residual stream is rotated, and why.
        matrices: Embeddings and heads that streams of the original have loaded, while they live; on a GPU for good.
        ranks: Processes that share the work; this one alone by default.
        ahead: What was begun before the run asks for it.
    """

    config: RunConfig
    settings: ResolvedSettings
    source: ResolvedModel
    index: CheckpointIndex
    skeleton: Any
    structure: Structure
    units: tuple[Unit, ...]
    pins: UnitFormats
    device: torch.device
    dtype: torch.dtype
    recorder: Recorder = UNRECORDED
    offload: Offload | None = None
    left_units: tuple[Unit, ...] = ()
    rotation: str = "off"
    matrices: MutableMapping[str, Any] = field(default_factory=WeakValueDictionary, compare=False)
    ranks: Ranks = field(default=ALONE, compare=False)
    ahead: BegunWork = field(default_factory=BegunWork, compare=False)
    _tokenizer: _Tokenizer = field(default_factory=lambda: _Tokenizer(), compare=False, repr=False)

    @property
    def task(self) -> ModelTask:
        """What the model is for."""
        return model_task(self.skeleton)

    @property
    def row_format(self) -> RowFormat:
        """What a row holds: tokens, an image, a sound, or tokens beside one of these."""
        return row_format(self.skeleton)

    def unrotated(self) -> Job:
        """The job of the same model with every weight as it is stored."""
        if self.index.rotation is None:
            return self
        return replace(self, index=original_index(self.index), matrices=type(self.matrices)())

    def with_batch_size(self, rows: int) -> Job:
        """The job with another number of rows per forward pass."""
        return replace(self, settings=replace(self.settings, batch_size=rows))

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Dtype in which each linear's scales are stored: that of its source weight."""
        return {n: torch_dtype(self.index.tensors[f"{n}.weight"].dtype) for n in self.structure.linears}

    @property
    def holds_out_tokens(self) -> bool:
        """Whether rounding looks at held-out tokens by themselves."""
        return self.settings.method.needs_held_out or bool(self.config.gram_steps)

    @property
    def feedback_layers(self) -> frozenset[str]:
        """Layers that are to be rounded with output feedback, experts and an output head never among them.

        Raises:
            UsageError: If the configuration names none.
        """
        wanted, head = self.settings.output_feedback, self.structure.head
        if wanted == "off":
            return frozenset()
        members = [member for unit in self.units for member in unit.members]
        without = {m.name for m in members if is_expert(m.name)} | {m.name for m in (head.linears if head else ())}
        if wanted != "auto":
            return matching_layers(wanted, self.units, "--output-feedback") - without
        found = [m for m in members if m.name not in without and m.out_features <= FEEDBACK_ASPECT * m.in_features]
        too_much = sum(2 * m.out_features**2 for m in found) > FEEDBACK_BYTES
        return frozenset() if self.config.output_feedback is None and too_much else frozenset(m.name for m in found)

    def rounding(self, menu: Menu, refiner: Refiner | None = None) -> RoundingSpec:
        """How units are rounded to the formats of a menu."""
        return RoundingSpec.of_menu(self.settings.method, menu, self.stored_dtypes, refiner)

    @property
    def unquantized_linears(self) -> tuple[str, ...]:
        """Linears that stay as they are: ignored ones and those outside the blocks."""
        kept = {m.name for unit in self.units for m in unit.members}
        ignored = tuple(n for n in self.structure.linears if n not in kept)
        return ignored + self.structure.other_linears

    def stream(self, source: WeightSource | None = None, dtype: torch.dtype | None = None) -> ModelStream:
        """The model with weights from the checkpoint, or from another source; computing in ``dtype`` where given."""
        reader = self._reader() if source is None else source
        skeleton = copy.deepcopy(self.skeleton)
        # A head that is quantized is replaced in place.
        shares = dtype in (None, self.dtype) and self.structure.head is None
        memory = StreamMemory(self.offload, self.matrices if shares else None, owns=source is None)
        return ModelStream(skeleton, self.structure, reader, self.device, dtype or self.dtype, memory, self.recorder)

    def _reader(self) -> WeightSource:
        """Reads the checkpoint; on a GPU ahead, as there the host has time to."""
        reader = TensorReader(self.index, device=self.device)
        if self.device.type != "cuda":
            return reader
        # Tensors of which others are made are wanted on the CPU.
        ahead = copies_ahead(self.config, self.device) and not self.structure.conversions
        return Prefetcher(reader, pinned=True, device=self.device if ahead else None)

    def packed_stream(self, folder: Path, dtype: torch.dtype | None = None) -> ModelStream:
        """The model with the weights of a written folder; computing in ``dtype`` where given."""
        transposed = frozenset(n for n, linear in self.structure.linears.items() if linear.transposed)
        reader = PackedReader(folder, transposed, self.device)
        stream = self.stream(Prefetcher(reader, pinned=True) if self.device.type == "cuda" else reader, dtype)
        stream.input_formats = reader.activation_formats(self.structure.linears)
        if scales := reader.cache_scales():
            stream.cache = CacheRounding(cached_attentions(self.structure, self.skeleton), scales)
        return stream

    def layer_formats(self, formats: UnitFormats) -> LayerFormats:
        """Formats by layer from formats by unit, without layers that stay as they are."""
        return {m.name: fmt for u in self.units if not (fmt := formats[u.name]).is_unquantized for m in u.members}

    def layout(self, formats: UnitFormats) -> Layout:
        """Exact bytes of the output files for formats by unit."""
        caches = {attention.name: attention.parts(self.config.kv_cache) for attention in self.caches}
        known = self.structure.linears
        return plan_layout(self.index, self.layer_formats(formats), known, tables=self.tables, caches=caches)

    @property
    def caches(self) -> tuple[CachedAttention, ...]:
        """Attentions that get scales of the KV cache."""
        if self.config.kv_cache == "none":
            return ()
        found, tensors = cached_attentions(self.structure, self.skeleton), self.index.tensors
        weights = (tensors.get(f"{attention.name}{KEY_LAYER}.weight") for attention in found)
        return tuple(a.with_scales_of(info.dtype if info else "") for a, info in zip(found, weights, strict=True))

    @property
    def tables(self) -> tuple[EmbeddingTable, ...]:
        """Embeddings that are stored in 8 bits."""
        known = self.skeleton, self.structure.stored_names, self.index
        return (embedding_table(*known),) if self.config.embedding_bits == 8 else ()

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded once; an InputError says why it cannot be loaded."""
        return self._tokenizer.loaded(self.index.folder, self.source.runs_code)


def prepare(
    config: RunConfig, reporter: Reporter | None = None, writes: bool = True, states: Path | None = None
) -> Job:
    """Find or fetch the model, read headers, build the skeleton, discover its layers, resolve pins.

    Args:
        config: The run's configuration.
        reporter: Narration.
        writes: Whether a packed folder will come of it; then what its profile's engines do not load is refused.
        states: Existing folder for hidden states that memory does not hold (default: the system's temporary one).

    Raises:
        HawqError: For anything that would fail later and can be known now.
    """
    device = chosen_device(config.device)
    narration = reporter or Silent()
    source = find_source(config, narration)
    found = discover_checkpoint(config, source, writes)
    probe, index, structure = found.probe, found.index, found.structure
    if not structure.linears:
        raise InputError(f"{config.model}: no linear layer was found in its blocks")
    stored = stored_dtype(index, structure)
    dtype = torch.float32 if device.type == "cpu" else stored
    units, left, pins = _chosen_units(config, index, structure, narration)
    if config.max_active is not None:
        units = _with_active_shares(units, probe.config, "--max-active")
    elif names_hardware(config.costs) and any(map(is_expert, structure.linears)):
        units = _with_active_shares(units, probe.config, f"--costs {config.costs}")
    longest = _longest_row(config, probe)
    skeleton = build_skeleton(index.folder, dtype, source.runs_code, index.tensors, config.profile == "vllm")
    if config.quantize_vision:
        read_images(skeleton)
    config = with_embedding_bits(config, skeleton, structure.stored_names, index, narration)
    settings = resolve_settings(config, device.type, longest, any(map(is_expert, structure.linears)))
    job = Job(config, settings, source, index, skeleton, structure, units, pins, device, dtype, left_units=left)
    _check_method(job)
    if writes and config.profile != "vllm":
        _check_experts(job)
    rows = (settings.num_samples, max(settings.seq_len, row_positions(probe, settings.seq_len)))
    work = Work(config, index, structure, device, dtype, *rows, settings.method.needs_drift)
    job = job.with_batch_size(settings.batch_size or choose_batch_size(work))
    job = replace(job, rotation=found.rotation, matrices={} if device.type == "cuda" else job.matrices)
    return replace(job, offload=make_offload(work, job.settings.batch_size, narration.warn, states))


def _chosen_units(
    config: RunConfig, index: CheckpointIndex, structure: Structure, reporter: Reporter
) -> tuple[tuple[Unit, ...], tuple[Unit, ...], UnitFormats]:
    """Units that are quantized, those that a quantized original left in 16 bits, and pinned formats by unit."""
    ignored = resolve_ignored(config.ignore, structure.units, structure.other_linears)
    for line in ignored_along(config.ignore, structure.units):
        reporter.warn(line)
    units = tuple(unit for unit in structure.units if unit.name not in ignored)
    if not units:
        raise UsageError("every layer is ignored, at least one was expected to stay; remove patterns from --ignore")
    pins = _pins(config, units) if config.pin else {}
    free = {u.name: [m.name for m in u.members] for u in units if u.name not in pins}
    left_names = left_unquantized(original_index(index), free)
    left = tuple(unit for unit in units if unit.name in left_names)
    return tuple(unit for unit in units if unit.name not in left_names), left, pins


def _longest_row(config: RunConfig, probe: Any) -> int | None:
    """Most positions of a row by default; None where nothing bounds them.

    Raises:
        UsageError: If the configuration asks for more than the model has.
    """
    longest = max_positions(probe)
    if config.seq_len and longest and config.seq_len > longest:
        raise UsageError(f"--seq-len {config.seq_len} exceeds the model's {longest} positions; lower it")
    form = row_format(probe)
    if not form.is_joint:
        return longest
    joint = JOINT_TOKENS + len(form.image)
    return min(longest or joint, joint)


def _pins(config: RunConfig, units: tuple[Unit, ...]) -> UnitFormats:
    """Formats that ``--pin`` fixes, each at the group size that its unit takes."""
    sizes = {name: fmt.group_size for name, fmt in uniform_formats(units, 8, config.base_group_size).items()}
    return resolve_pins(config.pin, units, sizes, config.symmetric)


def _with_active_shares(units: tuple[Unit, ...], config: Any, flag: str) -> tuple[Unit, ...]:
    """Units that know which share of their weights a token reads.

    Raises:
        UsageError: If no layer is an expert, or the configuration does not say how many experts a token goes through.
    """
    if not any(is_expert(member.name) for unit in units for member in unit.members):
        raise UsageError(f"{flag} is for routed experts, and none are quantized here; use --target-size instead")
    per_token = experts_per_token(config)
    if per_token is None:
        raise UsageError(
            f"{flag}: config.json does not say how many experts a token goes through (such as "
            "num_experts_per_tok); use --costs with a file of your own"
        )
    shares = (active_share([m.name for m in u.members], [m.num_weights for m in u.members], per_token) for u in units)
    return tuple(replace(unit, active_share=share) for unit, share in zip(units, shares, strict=True))


def _check_method(job: Job) -> None:
    """Check that formats load in this model, and that the rounding method can work on it with these rows.

    Raises:
        UsageError: Otherwise.
    """
    check_formats(job.units, job.stored_dtypes, job.config)
    method, rows = job.settings.method, job.settings.num_samples
    expert = next(filter(is_expert, job.structure.linears), None)
    if method.needs_drift and expert:
        raise UsageError(
            f"{expert} is an expert, which after rounding gets other tokens than before, so that --rounding gptaq and "
            "--target-shift have nothing to compare; use --rounding gptq or foem without a shift"
        )
    least = SETTINGS_HELD_OUT_EVERY + job.config.learns
    judged = {"--output-feedback is": job.feedback_layers, "--gram-steps are": job.config.gram_steps}
    for flag in (flag for flag, given in judged.items() if given and rows < least):
        raise UsageError(
            f"{flag} judged on every {SETTINGS_HELD_OUT_EVERY}th calibration row that rounding sees, "
            f"found --num-samples {rows}; raise it to {least} or more"
        )
    if method.needs_held_out and rows < SETTINGS_HELD_OUT_EVERY:
        raise UsageError(
            f"--foem-beta auto, --target-shift auto and --scale-refit choose on every {SETTINGS_HELD_OUT_EVERY}th "
            f"calibration row, found --num-samples {rows}; raise it to {SETTINGS_HELD_OUT_EVERY} or more"
        )


def _check_experts(job: Job) -> None:
    """Check that transformers will load the experts of the folder.

    Raises:
        UsageError: If it would not.
    """
    found = filter(is_expert, job.structure.linears)
    if any(found) and not any(is_expert(m.name) for unit in job.units for m in unit.members):
        raise UsageError(
            f"all experts are ignored, and transformers cannot load them: {UNPACKED}; quantize them, to 8 bits by "
            "--pin, or use --profile vllm"
        )


def chosen_device(wanted: str) -> torch.device:
    """The device that ``--device`` means here.

    Raises:
        UsageError: If there is none of that kind.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    own = "cuda" if world_size() == 1 else f"cuda:{local_rank()}"
    return torch.device("cpu" if wanted == "cpu" or not available else own)
