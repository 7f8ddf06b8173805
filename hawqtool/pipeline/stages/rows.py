"""The four disjoint sets of rows of a run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hawqtool.data.generate import SampledModel, generate_rows
from hawqtool.data.images import image_processor, image_rows
from hawqtool.data.mixing import SourceRows, mix_rows, quotas, require_rows
from hawqtool.data.sources import is_hub, open_source
from hawqtool.data.tokens import overlap, source_rows
from hawqtool.errors import InputError, UsageError
from hawqtool.model.skeleton import token_embedding
from hawqtool.model.tasks import image_shape
from hawqtool.pipeline.run.checkpoints import SAMPLED
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.records import Rows
from hawqtool.settings.fields import SELF

ROLES = ("calibration", "scoring", "selection", "report")
_SMALLEST_SET, _SCORING_SET, _SHORT_ROW, _FEWEST_REPORT_ROWS = 8, 16, 512, 2


def row_counts(num_samples: int, eval_samples: int, length: int | None) -> dict[str, int]:
    """Rows of each set: rounding, scoring, selecting a plan, reporting.

    Rows of less than 512 tokens are scored on at least 16: noise falls with the rows, and short ones cost little.

    Args:
        num_samples: Calibration rows.
        eval_samples: Rows to report on.
        length: Tokens of a row; None for images.
    """
    side = max(_SMALLEST_SET, num_samples // 16)
    short = length is None or length < _SHORT_ROW
    scoring = max(side, _SCORING_SET) if short else side
    return {"calibration": num_samples, "scoring": scoring, "selection": side, "report": eval_samples}


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


def check_sources(job: Job) -> None:
    """Cut the rows of all sources on this machine, and keep none.

    Raises:
        UsageError: If a source's weight is so small that it gives no row.
        InputError: If a source cannot be read or holds too little text.
    """
    config = job.config
    if not config.reads_rows:
        return
    names, weights = zip(*config.calibration_weights.items(), strict=True)
    shares = zip(names, quotas(_counts(job), weights), strict=True)
    require_rows([_given_source(job, name, quota) for name, quota in shares if name != SELF and not is_hub(name)])
    if config.eval_data is not None and not is_hub(config.eval_data):
        evaluation_rows(job, config.eval_data, job.settings.eval_samples)


def used_rows(job: Job) -> dict[str, int]:
    """Rows of every set that the run reads, those of ``eval_data`` too."""
    if not job.config.reads_rows:
        return {}
    return _counts(job) | ({"report": job.settings.eval_samples} if job.config.eval_data is not None else {})


def _counts(job: Job) -> dict[str, int]:
    """Rows of each set that the calibration sources give; of a uniform plan there is nothing to score or to choose."""
    config, counts = job.config, _all_counts(job)
    unused = {"report"} if config.eval_data is not None or not config.evaluates else set()
    if config.uniform_width is not None:
        unused |= {"scoring", "selection"}
    elif not config.evaluates:
        unused.add("selection")
    return {role: count for role, count in counts.items() if role not in unused}


def _all_counts(job: Job) -> dict[str, int]:
    length = None if job.takes_images else job.settings.seq_len
    return row_counts(job.settings.num_samples, job.settings.eval_samples, length)


def calibration_rows(context: RunContext, counts: dict[str, int]) -> dict[str, Rows]:
    """Sets of so many rows from the calibration sources.

    Raises:
        UsageError: If a source's weight is so small that it gives no row.
        InputError: If a source holds too little text.
    """
    job, config = context.job, context.job.config
    names, weights = zip(*config.calibration_weights.items(), strict=True)
    shares = dict(zip(names, quotas(counts, weights), strict=True))
    sources = {name: _given_source(job, name, quota) for name, quota in shares.items() if name != SELF}
    require_rows(list(sources.values()))
    if SELF in shares:
        sources[SELF] = _sampled_source(context, shares[SELF])
    return mix_rows([sources[name] for name in names])


def evaluation_rows(job: Job, text: str, wanted: int) -> Rows:
    """The first ``wanted`` rows of a source, fewer where it is shorter.

    Raises:
        InputError: If it holds fewer than two rows.
    """
    label, rows = _rows(job, text, wanted, seed=0)
    quota = {"report": max(len(rows[:wanted]), _FEWEST_REPORT_ROWS)}
    return mix_rows([SourceRows(label, rows[:wanted], quota)])["report"]


def check_calibration(job: Job) -> None:
    """Check that the calibration source suits the model.

    Raises:
        UsageError: If rows are to be sampled from a model that is no causal language model.
    """
    if SELF in job.config.calibration_weights and not job.task.generates:
        raise UsageError(
            f"rows cannot be sampled from this {job.task.name}; give --calibration "
            + ("a folder of images" if job.takes_images else "a text")
        )


def _given_source(job: Job, text: str, quota: dict[str, int]) -> SourceRows:
    return SourceRows(*_rows(job, text, _needed(text, quota), job.config.seed), quota)


def _rows(job: Job, text: str, count: int, seed: int) -> tuple[str, Tensor]:
    """Label and rows of a source, at least ``count`` where it holds them."""
    if job.takes_images:
        images = image_rows(image_processor(job.index.folder), Path(text), count, seed)
        _check_images(job, images)
        return Path(text).name, images
    source = open_source(text)
    # Encoders were trained on sequences between special tokens, language models on running text.
    rows = source_rows(job.tokenizer(), source, count, job.settings.seq_len, seed, sentences=not job.task.generates)
    return source.title, _known(job, rows)


def _sampled_source(context: RunContext, quota: dict[str, int]) -> SourceRows:
    job, count = context.job, _needed(SELF, quota)
    known = context.saved.load(SAMPLED)
    if known is not None:
        return SourceRows(SELF, known, quota)
    context.reporter.say(f"sampling {count} rows of {job.settings.seq_len} tokens from the model")
    trusted, loader = job.source.runs_code, job.task.auto_class
    model = SampledModel(job.index.folder, job.tokenizer(), job.device, job.dtype, trusted, loader)
    tokens = generate_rows(model, count, job.settings.seq_len, job.config.seed, context.progress("sampling tokens"))
    context.saved.save(SAMPLED, tokens)
    return SourceRows(SELF, tokens, quota)


def _needed(name: str, quota: dict[str, int]) -> int:
    count = sum(quota.values())
    if not count:
        raise UsageError(f"--calibration {name}: its weight is so small that it gives no row; raise it or drop it")
    return count


def _known(job: Job, tokens: Tensor) -> Tensor:
    """The tokens, after checking that the model has an embedding for each."""
    known, _ = token_embedding(job.skeleton) or (None, None)
    if known is not None and tokens.numel() and int(tokens.max()) >= known:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, the model embeds {known} tokens; "
            "expected a tokenizer and weights of one model; download them again"
        )
    return tokens


def _check_images(job: Job, images: Tensor) -> None:
    channels, size = image_shape(job.skeleton.config)
    found = tuple(images.shape[1:])
    expected = (channels, *(size or found[1:]))
    if found != expected:
        raise InputError(
            f"the image processor gives images of {' x '.join(map(str, found))}, the model takes "
            f"{' x '.join(map(str, expected))}; expected preprocessor_config.json and config.json of one model"
        )
