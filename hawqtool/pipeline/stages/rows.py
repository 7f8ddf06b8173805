"""The four disjoint sets of rows of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hawqtool.data.media_rows import MediaReader, RowTexts, Transcribe
from hawqtool.data.mixing import (
    SMALLEST_SET,
    SourceRows,
    equal_quotas,
    mix_rows,
    pieces,
    quotas,
    require_rows,
    row_counts,
)
from hawqtool.data.sources import check_found, is_hub, is_plain_text, open_source
from hawqtool.data.tokenizer import frame
from hawqtool.data.tokens import overlap, source_rows
from hawqtool.data.transcribe import transcribe
from hawqtool.errors import InputError, UsageError
from hawqtool.model.inputs.arguments import first_decoder_token, image_shape
from hawqtool.model.inputs.row_format import IMAGES, SOUNDS
from hawqtool.model.skeleton import token_embedding
from hawqtool.model.tasks import feeds_decoder
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.stages.sampled_rows import (
    Texts,
    begin_sampling,
    can_sample,
    check_share,
    rows_if_possible,
    sampled_model,
    source_weights,
    texts_of,
    without_sampling,
)
from hawqtool.records import Rows
from hawqtool.settings.fields import SELF

ROLES = ("calibration", "scoring", "selection", "report")
_EXPECTED = {IMAGES: "a folder of images", **dict.fromkeys(SOUNDS, "a folder of WAV files")}
_FEWEST_REPORT_ROWS = 2

_ENDS = "ends"
"""Key of a stream that nobody asks for: what it has loaded is there for others (see `Job.matrices`)."""

_FEW_PIECES = 3
SELECTION_LENGTH = 256
"""Most tokens of a selection row: of so many tokens, more and shorter rows are of more texts."""


def gather_rows(context: RunContext, scores_alone: bool = False) -> dict[str, Rows]:
    """Cut or sample the calibration, scoring, selection and report rows; sampled ones are saved, and read from there.

    Sets that the run has no use for are left out, but not where scores are all that is made: then each width has some.

    Raises:
        UsageError: If a source's weight is so small that it gives no row.
        InputError: If a source holds too little text, or sets overlap.
    """
    job, config = context.job, context.job.config
    if not config.reads_rows and not scores_alone:
        return {}
    check_calibration(job)
    counts = _counts(job) | ({"scoring": _all_counts(job)["scoring"]} if scores_alone else {})
    # Text first: what is wrong with it shows before minutes go into sampling.
    report = {}
    if config.eval_data is not None:
        report = {"report": evaluation_rows(job, config.eval_data, job.settings.eval_samples)}
    sets = calibration_rows(context, counts) | report
    shared = overlap(sets)
    if shared:
        raise InputError(
            f"{shared} rows occur in more than one of the calibration, scoring, selection and report sets; "
            "give text without repetitions, or another --eval-data"
        )
    return sets


def read_ahead(job: Job) -> None:
    """Begin to cut the rows of plain texts beside other work, where the host has time for it: on a GPU.

    What fails there fails again when the rows are asked for.
    """
    config = job.config
    if job.device.type != "cuda" or not config.reads_rows or job.row_format.values is not None:
        return
    wanted = [(config.eval_data, job.settings.eval_samples, 0)] if config.eval_data is not None else []
    for name, quota in _shares(job, _counts(job)).items():
        if name != SELF:
            wanted.append((name, _needed(name, _of_long_rows(job, quota)), config.seed))
    for text, count, seed in wanted:
        if is_plain_text(text):
            job.ahead.begin((text, count, seed), partial(_text_rows, job, text, count, seed))


def load_ends_ahead(job: Job) -> None:
    """Begin to load embedding and head, which streams share, onto a GPU."""
    shared = job.index.rotation is None and job.structure.head is None  # a head that is quantized is each stream's own
    if job.device.type == "cuda" and shared:
        job.ahead.begin(_ENDS, job.stream)


def load_ahead(job: Job, resuming: bool) -> None:
    """Begin to load the ends of the model onto a GPU, and to sample rows where they are wanted.

    Of rows that several processes sample together the model alone is loaded. While that goes on, nothing else may make
    tensors of the default dtype, which transformers changes for a moment, without saying of which dtype they are. A run
    that resumes may have the rows.
    """
    if job.device.type != "cuda":
        return
    load_ends_ahead(job)
    shares = {} if resuming or not job.config.reads_rows else _shares(job, _counts(job))
    if SELF in shares:
        begin_sampling(job, _asked_of_model(job, shares[SELF])[0])


def check_sources(job: Job) -> None:
    """Cut the rows of all sources on this machine, and keep none.

    Raises:
        UsageError: If a source's weight is so small that it gives no row.
        InputError: If a source cannot be read or holds too little text, or the tokenizer cannot be loaded.
    """
    config = job.config
    if not config.reads_rows:
        return
    shares = _shares(job, _counts(job))
    if SELF in shares:
        job.tokenizer()  # nothing is sampled, but what is needed for it is there
    here = [(name, quota) for name, quota in shares.items() if name != SELF and not is_hub(name)]
    require_rows([_given_source(job, name, quota, samples=False) for name, quota in here])
    if config.eval_data is not None and not is_hub(config.eval_data):
        evaluation_rows(job, config.eval_data, job.settings.eval_samples, samples=False)


def used_rows(job: Job) -> dict[str, int]:
    """Rows of every set that the run reads, those of ``eval_data`` too."""
    if not job.config.reads_rows:
        return {}
    return _counts(job) | ({"report": job.settings.eval_samples} if job.config.eval_data is not None else {})


def _counts(job: Job) -> dict[str, int]:
    """Rows of each set that the calibration sources give; of a uniform plan there is nothing to score or to choose."""
    config, counts = job.config, _all_counts(job)
    unused = {"report"} if config.eval_data is not None or not config.evaluates else set()
    if config.is_uniform:
        unused |= {"scoring", "selection"}
    elif not config.evaluates:
        unused.add("selection")
    return {role: count for role, count in counts.items() if role not in unused}


def _all_counts(job: Job) -> dict[str, int]:
    length = job.settings.seq_len if job.row_format.values is None else None
    settings = job.settings
    samples = settings.num_samples, settings.selection_samples, settings.eval_samples
    return row_counts(*samples, length, job.device.type)


def selection_sources(job: Job) -> tuple[str, ...]:
    """Sources of the selection rows: those asked for, else the calibration sources, two where that can be.

    Beside a single text stand rows that the model writes, if the whole model fits into memory and its tokenizer names
    a token to begin with.
    """
    config, names = job.config, tuple(job.config.calibration_weights)
    if config.selection_data:
        return config.selection_data
    alone = len(names) == 1 and SELF not in names
    return (*names, SELF) if alone and config.chooses and can_sample(job) else names


def _shares(job: Job, counts: dict[str, int]) -> dict[str, dict[str, int]]:
    """Rows of each set by source: by their weights, but the selection rows in equal parts."""
    weights, given = source_weights(job), job.config.calibration_weights
    found = dict(zip(weights, quotas(counts, list(weights.values())), strict=True))
    if "report" in counts:  # rows of the given texts judge, whatever the model writes beside them
        judging = quotas({"report": counts["report"]}, list(given.values()))
        found = {name: quota | {"report": 0} for name, quota in found.items()}
        found |= {name: found[name] | quota for name, quota in zip(given, judging, strict=True)}
    # Rows that judge go by the given texts alone, and selection rows by no weights.
    calibrating = ["calibration"] if "calibration" in counts else [role for role in counts if role != "selection"]
    for name in given:
        if not any(found[name][role] for role in calibrating):
            raise _without_rows(name)
    if counts.get("selection"):
        wanted = selection_sources(job)
        found |= {name: dict.fromkeys(counts, 0) for name in wanted if name not in found}
        equal_quotas(list(found.values()), "selection", [name in wanted for name in found])
    return {name: quota for name, quota in found.items() if name != SELF or any(quota.values())}


def calibration_rows(context: RunContext, counts: dict[str, int]) -> dict[str, Rows]:
    """Sets of so many rows from the calibration sources.

    Raises:
        UsageError: If a source's weight is so small that it gives no row.
        InputError: If a source holds too little text.
    """
    job, shares = context.job, _shares(context.job, counts)
    sources = {name: _given_source(job, name, quota) for name, quota in shares.items() if name != SELF}
    require_rows(list(sources.values()))
    if SELF in shares:
        texts, quota = _asked_of_model(job, shares[SELF])
        written = rows_if_possible(context, texts)
        if written is None:
            return calibration_rows(replace(context, job=without_sampling(job)), counts)
        sources[SELF] = SourceRows(SELF, written, quota)
    choosing = [(sources[name], quota["selection"]) for name, quota in shares.items() if quota.get("selection")]
    others = [replace(sources[name], quota=_but_selection(quota)) for name, quota in shares.items()]
    found = mix_rows([source for source in others if any(source.quota.values())])
    if not choosing:
        return found
    # Each source's selection rows lie behind its rows of the other sets.
    selection = mix_rows([_choosing(job, source, count) for source, count in choosing])
    return {role: (found | selection)[role] for role in counts}


def _is_running_text(job: Job) -> bool:
    return job.task.generates and job.row_format.values is None


def _but_selection(quota: Mapping[str, int]) -> dict[str, int]:
    return {role: count for role, count in quota.items() if role != "selection"}


def _choosing(job: Job, source: SourceRows, count: int) -> SourceRows:
    """What a source gives to the selection rows, several of them from a long row."""
    first = sum(_but_selection(source.quota).values())
    rows = source.tokens[first : first + source.quota["selection"]]
    if _is_running_text(job):
        before, _ = frame(job.tokenizer())
        rows = pieces(rows, count, min(SELECTION_LENGTH, rows.shape[1]), before)
    return SourceRows(source.label, rows, {"selection": count})


def _of_long_rows(job: Job, quota: dict[str, int]) -> dict[str, int]:
    """A quota in rows of the calibration's length: several selection rows are cut from one, of several texts still."""
    each, count = job.settings.seq_len // SELECTION_LENGTH, quota.get("selection", 0)
    if not _is_running_text(job) or each < _FEW_PIECES or not count:
        return quota
    # A special token in front of every piece leaves too little for the last one.
    return quota | {"selection": min(count, max(SMALLEST_SET, math.ceil(count / (each - 1))))}


def evaluation_rows(job: Job, text: str, wanted: int, samples: bool = True) -> Rows:
    """The first ``wanted`` rows of a source, fewer where it is shorter; transcripts that it lacks are sampled or not.

    Raises:
        InputError: If it holds fewer than two rows.
    """
    label, rows = _rows(job, text, wanted, 0, samples)
    quota = {"report": max(len(rows[:wanted]), _FEWEST_REPORT_ROWS)}
    return mix_rows([SourceRows(label, rows[:wanted], quota)])["report"]


def check_calibration(job: Job) -> None:
    """Check that sources are there and suit the model, without reading them.

    Raises:
        UsageError: If rows are to be sampled from a model that is no causal language model.
        InputError: If a source is not found.
    """
    config = job.config
    check_share(job)
    if config.reads_rows:
        named = (*config.calibration_weights, *config.selection_data, config.eval_data)
        for text in (text for text in named if text not in (SELF, None)):
            check_found(text)
    for flag, names in (("--calibration", config.calibration_weights), ("--selection-data", config.selection_data)):
        if SELF in names and not job.task.generates:
            expected = _EXPECTED.get(str(job.row_format.values), "a text")
            raise UsageError(f"rows cannot be sampled from this {job.task.name}; give {flag} {expected}")


def _given_source(job: Job, text: str, quota: dict[str, int], samples: bool = True) -> SourceRows:
    quota = _of_long_rows(job, quota)
    return SourceRows(*_rows(job, text, _needed(text, quota), job.config.seed, samples), quota)


def _media_rows(job: Job, text: str, count: int, seed: int, samples: bool) -> tuple[str, Tensor]:
    """Label and rows of images or sounds, with tokens where the model reads both."""
    form, texts = job.row_format, None
    if form.is_joint:
        start = first_decoder_token(job.skeleton.config) if feeds_decoder(job.skeleton) else None
        texts = RowTexts(
            *(job.tokenizer(), job.settings.seq_len, start),
            transcribe=_transcribe(job, samples) if start is not None else None,
            image=form.image,
        )
    label, values, tokens = MediaReader(form, job.index.folder, texts).read(text, count, seed)
    _check_shape(job, values)
    return label, values if tokens is None else form.join(_known(job, tokens), values)


def _transcribe(job: Job, samples: bool) -> Transcribe:
    """Gives tokens for sounds without a transcript; where none are sampled, the first one over and over."""
    if not samples:
        return lambda sounds, before, positions: torch.tensor(before[:1]).expand(len(sounds), positions)
    return partial(transcribe, sampled_model(job))


def _rows(job: Job, text: str, count: int, seed: int, samples: bool = True) -> tuple[str, Tensor]:
    """Label and rows of a source, at least ``count`` where it holds them; transcripts that it lacks are sampled."""
    if job.row_format.values is not None:
        return _media_rows(job, text, count, seed, samples)
    return job.ahead.result((text, count, seed), partial(_text_rows, job, text, count, seed))


def _text_rows(job: Job, text: str, count: int, seed: int) -> tuple[str, Tensor]:
    source = open_source(text)
    # Encoders were trained on sequences between special tokens, language models on running text.
    rows = source_rows(job.tokenizer(), source, count, job.settings.seq_len, seed, sentences=not job.task.generates)
    return source.title, _known(job, rows)


def _asked_of_model(job: Job, quota: dict[str, int]) -> tuple[Texts, dict[str, int]]:
    """Texts that the model is to write, and the quota of the rows that they make."""
    length = job.settings.seq_len
    if SELF in source_weights(job):
        quota = _of_long_rows(job, quota)
    else:  # they choose alone
        length = min(length, SELECTION_LENGTH)
    return texts_of(job, _needed(SELF, quota), length), quota


def sampled_tokens(job: Job) -> int:
    """Tokens that the model writes for the sets of a run."""
    shares = _shares(job, _counts(job)) if job.config.reads_rows else {}
    if SELF not in shares:
        return 0
    texts, _ = _asked_of_model(job, shares[SELF])
    return texts.number * texts.length


def _needed(name: str, quota: dict[str, int]) -> int:
    count = sum(quota.values())
    if not count:
        raise _without_rows(name)
    return count


def _without_rows(name: str) -> UsageError:
    return UsageError(
        f"--calibration {name}: its weight is so small that it gives no row; raise it or --num-samples, or drop it"
    )


def _known(job: Job, tokens: Tensor) -> Tensor:
    """The tokens, after checking that the model has an embedding for each."""
    known, _ = token_embedding(job.skeleton) or (None, None)
    if known is not None and tokens.numel() and int(tokens.max()) >= known:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, the model embeds {known} tokens; "
            "expected a tokenizer and weights of one model; download them again"
        )
    return tokens


def _check_shape(job: Job, values: Tensor) -> None:
    form, found = job.row_format, tuple(values.shape[1:])
    free = form.values == IMAGES and image_shape(job.skeleton.config)[1] is None
    expected = (*(form.shape or ())[:1], *found[1:]) if free else form.shape or found
    if len(found) != len(expected) or any(size not in (-1, seen) for size, seen in zip(expected, found, strict=True)):
        kind = form.kind.partition(" ")[0]
        raise InputError(
            f"the {kind[:-1]} processor gives {kind} of {' x '.join(map(str, found))}, the model takes "
            f"{' x '.join('any' if size < 0 else str(size) for size in expected)}; expected "
            "preprocessor_config.json and config.json of one model"
        )
