"""Rows that the model itself writes: which share of the calibration they are, and how they are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hawqtool.data.generate import BATCH_ROWS, SampledModel, generate_rows, load_sampled
from hawqtool.errors import SamplingError, UsageError
from hawqtool.model.skeleton import token_embedding
from hawqtool.model.tasks import feeds_decoder
from hawqtool.pipeline.run.checkpoints import SAMPLED
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.memory_budget import half_of_memory, memory_limit
from hawqtool.records import Rows
from hawqtool.runtime.launched import world_size
from hawqtool.settings.fields import SELF

TEXT_LENGTH = 128
"""Most tokens of a text that the model writes on a GPU, where a step takes little longer for many texts than for few.

A row is of as many texts as it takes. More and shorter texts are of more kinds, which calibrates better: SmolLM2's
off-lattice copy, 3 bits in groups of 64, half of 128 rows of 2048 tokens sampled, KL on encyclopedia, code and manual
with texts of 128 tokens 0.268, 0.296, 0.254, of 512 tokens 0.270, 0.300, 0.266 (one draw).
"""

_SAMPLED_MODEL, _SAMPLED_ROWS = "sampled model", "sampled rows"
"""Keys of the model to sample from, where it is loaded ahead, and of the texts, where they are sampled ahead too."""


class Texts(NamedTuple):
    """What the model is to write: so many texts of so many tokens, ``per_row`` of them in a row."""

    number: int
    length: int
    per_row: int


def source_weights(job: Job) -> dict[str, float]:
    """Calibration sources with their weights: those given, and beside texts alone the model, by ``sampled_share``.

    Any text has less of some things than the model will meet: at 3 bits, code and manuals lose a quarter to a half of
    their divergence by it where web text calibrates (docs/results.md). What was left to the run stays out where rows
    cannot be sampled.
    """
    given, share = job.config.calibration_weights, job.settings.sampled_share
    if SELF in given or not share or not can_sample(job):
        return given
    return given | {SELF: sum(given.values()) * share / (1 - share)}


def can_sample(job: Job) -> bool:
    """Whether the model writes text, fits into memory as a whole, and its tokenizer names a token to begin with."""
    return _hindrance(job) is None


def recorded_share(job: Job) -> float | None:
    """The share by which a rerun samples what this run does, whatever its device; None beside rows of the model alone.

    A share that was left to the run and cannot be, asked for, would be refused.
    """
    share, config = job.settings.sampled_share, job.config
    if config.sampled_share is not None or SELF in config.calibration_weights or not config.reads_rows:
        return config.sampled_share
    return share if share and can_sample(job) else 0.0


def check_share(job: Job) -> None:
    """Check that a share that was asked for can be sampled.

    Raises:
        UsageError: Otherwise; says why.
    """
    share = job.config.sampled_share
    if share is not None and SELF in job.config.calibration_weights:
        raise UsageError("--sampled-share goes beside texts, and --calibration names self; give self a weight: self=2")
    found = _hindrance(job) if share else None
    if found is not None:
        raise UsageError(f"--sampled-share {share:g}: rows cannot be sampled, {found}; give 0, or leave it out")


def _hindrance(job: Job) -> str | None:
    if not job.task.generates or job.row_format.values is not None:
        return f"as this {job.task.name} writes no text"
    if feeds_decoder(job.skeleton):
        return "as a decoder writes them, and rows are what the encoder reads"
    if not _loads_to_generate(job):
        return f"as transformers does not load {type(job.skeleton).__name__} to generate text"
    if job.index.source_format is not None:  # read by us alone; transformers may take it for something else
        return "as the original is quantized"
    tokenizer = job.tokenizer()
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        return "as the tokenizer names no begin or end token"
    first, (known, _) = sampled_model(job).first_token, token_embedding(job.skeleton) or (None, None)
    if known is not None and first >= known:  # a GPU's process does not survive it
        return f"as they begin with token {first}, and the model embeds {known} tokens"
    if weight_bytes(job) > (memory_limit(job.config, job.device) or half_of_memory()):
        return "as the whole model does not fit into memory"
    return None


def _loads_to_generate(job: Job) -> bool:
    """Whether transformers takes the model's own class where rows are sampled, and that one can generate."""
    import transformers

    model = job.skeleton
    if not model.can_generate():
        return False
    if model.is_custom_code():  # known to the checkpoint alone
        return True
    found = getattr(transformers, job.task.auto_class)._model_mapping.get(type(model.config), ())
    return type(model) in (found if isinstance(found, tuple) else (found,))


def weight_bytes(job: Job) -> int:
    """Bytes of all weights in memory."""
    return sum(math.prod(info.shape) for info in job.index.tensors.values()) * job.dtype.itemsize


def texts_of(job: Job, rows: int, length: int) -> Texts:
    """Texts that make so many rows of ``length`` tokens."""
    short = job.device.type == "cuda" and length % TEXT_LENGTH == 0
    per_row = length // TEXT_LENGTH if short else 1
    return Texts(rows * per_row, length // per_row, per_row)


def begin_sampling(job: Job, texts: Texts) -> None:
    """Load the model to sample from beside other work, and sample too where one process does all of it."""
    if world_size() > 1 and texts.number > BATCH_ROWS:
        job.ahead.begin(_SAMPLED_MODEL, partial(load_sampled, sampled_model(job)))
    else:
        job.ahead.begin(_SAMPLED_ROWS, partial(_sampled, job, texts))


def sampled_rows(context: RunContext, texts: Texts) -> Tensor:
    """Rows of these texts, ``[rows, tokens]`` int64; a run that goes on has those of its start."""
    job, stage = context.job, context.progress("sampling tokens")
    count, length, per_row = texts
    known = context.saved.load(SAMPLED)
    if isinstance(known, str):
        raise SamplingError(known)
    if known is not None:
        found: Tensor = known
        return found
    context.reporter.say(f"sampling {count // per_row} rows of {per_row * length} tokens from the model")
    # Each loads the whole model, through the host's memory. A GPU takes a step for all rows of a batch at once.
    many = job.device.type == "cpu" or count > BATCH_ROWS
    if many and context.ranks.size > 1 and context.ranks.size * weight_bytes(job) <= half_of_memory():
        tokens = _sampled(context.shared(_sampled, texts), texts, stage)
    else:
        tokens = job.ahead.result(_SAMPLED_ROWS, partial(_sampled, job, texts, stage))
    stage(count * length, count * length)
    tokens = tokens.reshape(-1, per_row * length)
    context.saved.save(SAMPLED, tokens)
    return tokens


def rows_if_possible(context: RunContext, texts: Texts) -> Tensor | None:
    """What `sampled_rows` gives; None where transformers fails at it in a run that did not ask for it, which is said.

    A run that goes on then samples none either.
    """
    config = context.job.config
    if config.sampled_share or SELF in (*config.calibration_weights, *config.selection_data):  # it was asked for
        return sampled_rows(context, texts)
    try:
        return sampled_rows(context, texts)
    except SamplingError as error:
        context.reporter.warn(f"the model writes no rows beside the texts: {error}")
        context.saved.save(SAMPLED, str(error))
    return None


def without_sampling(job: Job) -> Job:
    """The job of a run that samples no rows beside its texts."""
    config, settings = job.config, replace(job.settings, sampled_share=0.0)
    chosen_on = config.selection_data or tuple(config.calibration_weights)
    return replace(job, settings=settings, config=config.model_copy(update={"selection_data": chosen_on}))


def as_sampled(job: Job, calibration: Rows) -> Job:
    """The job of a run with these rows: where the model was to write some unasked and failed, one that samples none."""
    config, wanted = job.config, job.settings.sampled_share
    unasked = config.sampled_share is None and SELF not in config.calibration_weights
    return without_sampling(job) if wanted and unasked and SELF not in calibration.sources else job


def sampled_model(job: Job) -> SampledModel:
    """The whole model as transformers loads it."""
    limit = memory_limit(job.config, job.device) if job.device.type == "cuda" else None
    room = None if limit is None else max(0, limit - weight_bytes(job))
    trusted, loader = job.source.runs_code, job.task.auto_class
    return SampledModel(job.index.folder, job.tokenizer(), job.device, job.dtype, trusted, loader, room)


def _sampled(job: Job, texts: Texts, progress: Callable[[int, int], None] = lambda *_: None) -> Tensor:
    """Texts ``[number, length]`` that the model writes, for the leader; of other ranks their share.

    Raises:
        SamplingError: Of the leader, if transformers fails at it on any rank.
    """
    share, seed = job.ranks.share(texts.number), job.ranks.seed(job.config.seed)
    source = sampled_model(job)
    load = partial(job.ahead.result, _SAMPLED_MODEL, partial(load_sampled, source))
    own, failure = torch.empty(0, texts.length, dtype=torch.long), None
    try:
        own = generate_rows(source, share.stop - share.start, texts.length, seed, progress, load)
    except SamplingError as error:
        failure = str(error)
    shares = job.ranks.to_owner((own, failure), 0) or [(own, None)]
    for _, failed in shares:
        if failed is not None:
            raise SamplingError(failed)
    return torch.cat([rows for rows, _ in shares])
