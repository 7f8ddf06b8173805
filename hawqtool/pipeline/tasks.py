"""Accuracy on tasks in a run: the original's beside that of a written folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hawqtool.data.choices import Question, read_questions
from hawqtool.data.tokenizer import load_tokenizer
from hawqtool.errors import InputError
from hawqtool.evaluation.tasks import answers, task_result
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.report.plan_comparison import TaskResult
from hawqtool.streaming.stream import ModelStream

_NO_LIMIT = 1 << 20


def check_tasks(job: Job) -> dict[str, list[Question]]:
    """Questions of every task of the configuration, by the name of its file.

    Raises:
        InputError: If the model is no causal language model, two files have one name, or a file cannot be used.
    """
    names = [Path(path).stem for path in job.config.tasks]
    if names and not job.task.generates:
        raise InputError(f"--tasks asks causal language models; {job.source.name} is a {job.task.name}; leave it out")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--tasks names two files {twice}; rename one, as results go by the name")
    if not names:
        return {}
    tokenizer = load_tokenizer(job.index.folder, job.config.trust_remote_code)
    longest = getattr(job.skeleton.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
    return {name: read_questions(path, tokenizer, longest) for name, path in zip(names, job.config.tasks, strict=True)}


def judge_tasks(context: RunContext, folder: Path) -> list[TaskResult]:
    """Results of all tasks, original and folder on the same questions; empty where none was asked for."""
    job, results = context.job, list[TaskResult]()
    for name, questions in check_tasks(job).items():
        taken = [
            _asked(context, stream, f"task {name}, {label}", questions)
            for label, stream in (("original", job.unrotated().stream()), ("quantized", job.packed_stream(folder)))
        ]
        results.append(task_result(name, questions, *taken))
    return results


def _asked(context: RunContext, stream: ModelStream, label: str, questions: list[Question]) -> Tensor:
    count = len(context.job.structure.blocks)
    return answers(
        stream,
        questions,
        context.job.settings.batch_size,
        lambda block: context.reporter.progress(label, block + 1, count),
    )
