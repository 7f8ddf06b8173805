"""The gates of a run: checked before the work, judged after it, and an earlier report to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.evaluation.gates import AT_LEAST, judge, judge_change
from hawqtool.model.kept import kept_share
from hawqtool.pipeline.run.files import REPORT_SCHEMA, read_json
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.search.trials import Trial
from hawqtool.records import Rows
from hawqtool.report.plan_comparison import shipped_of
from hawqtool.report.schema import Gate, Report
from hawqtool.values import parse_size


@dataclass(frozen=True)
class Baseline:
    """What an earlier report says of the result that it shipped.

    Args:
        path: Of the report.
        measure: What its divergence is.
        values: ``divergence``, ``perplexity`` (where the model has one) and ``size`` in bytes.
        source: Source of its report rows.
        fingerprint: Of these rows.
    """

    path: str
    measure: str
    values: dict[str, float]
    source: str
    fingerprint: str


def read_baseline(config: RunConfig) -> Baseline | None:
    """The report to compare with, None where none is given.

    Raises:
        UsageError: If the file is missing or no report of ours.
    """
    if config.baseline is None:
        return None
    advice = "give the report.json of an earlier run"
    try:
        report = read_json(Path(config.baseline), REPORT_SCHEMA)
    except InputError as error:
        raise UsageError(f"--baseline: {error}; {advice}") from error
    try:
        evaluation, rows = report["evaluation"], report["rows"]["report"]
        shipped, measure = evaluation[report["shipped"]], str(evaluation["measure"])
        values = {"divergence": float(shipped[measure]), "size": float(report["sizes"]["quantized_bytes"])}
        if "perplexity" in shipped:
            values["perplexity"] = float(shipped["perplexity"])
        return Baseline(config.baseline, measure, values, str(rows["source"]), str(rows["fingerprint"]))
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(f"--baseline {config.baseline} is damaged ({error!r}); {advice}") from error


def matching_baseline(config: RunConfig, rows: Rows) -> Baseline | None:
    """The baseline, checked to be of a run's report rows, as figures of different rows cannot be compared.

    Raises:
        UsageError: If it is of other rows.
    """
    baseline = read_baseline(config)
    if baseline is not None and rows.fingerprint != baseline.fingerprint:
        raise UsageError(
            f"--baseline {baseline.path} was measured on other report rows: fingerprint {baseline.fingerprint[:12]} "
            f"of {baseline.source}, this run's are {rows.fingerprint[:12]} of {rows.source}; give the same "
            "--eval-data, --eval-samples, --seq-len, --calibration and --seed, or make a new baseline"
        )
    return baseline


def check_gates(job: Job) -> None:
    """Check before the work that every gate can be judged.

    Raises:
        UsageError: If a gate is about something that this kind of model does not have, or the baseline is no report
            of such a model.
    """
    config, task = job.config, job.task
    lacking = dict.fromkeys(("min_same_top", "max_kl_p99", "max_flips"), not task.logits)
    lacking |= {"max_ppl_increase": not task.generates}
    for name in (name for name, lacks in lacking.items() if lacks and getattr(config, name) is not None):
        what = "perplexity" if name == "max_ppl_increase" else "likeliest token or class"
        raise UsageError(
            f"--{name.replace('_', '-')} cannot be judged: {job.source.name} ({type(job.skeleton).__name__}) has no "
            f"{what}; use --max-kl"
        )
    if config.max_task_drop is not None and not config.tasks:
        raise UsageError("--max-task-drop judges tasks, and none were given; add --tasks")
    share = kept_share(job.structure.kept, job.index)
    if config.max_kept is not None and share > config.max_kept:
        raise UsageError(
            f"{100 * share:.3g} % of the weights stay as they are beside embeddings and head, more than --max-kept "
            f"{100 * config.max_kept:.3g} %; raise it, or see what they are without it (--dry-run)"
        )
    baseline, measure = read_baseline(config), "kl" if task.logits else "embedding_error"
    if baseline is not None and (baseline.measure != measure or ("perplexity" in baseline.values) != task.generates):
        raise UsageError(
            f"--baseline {baseline.path} is of another kind of model: its measure is {baseline.measure}"
            f"{' with' if 'perplexity' in baseline.values else ' without'} perplexity, expected {measure}"
            f"{' with' if task.generates else ' without'}; give a report of the same model"
        )


def judge_gates(config: RunConfig, shipped: Trial, report: Report, baseline: Baseline | None) -> list[Gate]:
    """Records ``{name, sense, limit, found, passed}`` of every gate of the configuration.

    Args:
        config: The run's configuration.
        shipped: What the run ships.
        report: Its report so far.
        baseline: An earlier result on the same report rows.
    """
    evaluation = report["evaluation"]
    # Without an evaluation there are no gates that need one.
    result: dict[str, Any] = {} if evaluation is None else dict(shipped_of(evaluation, report["shipped"]))
    original: dict[str, Any] = {} if evaluation is None else dict(evaluation["original"])
    divergence: Any = math.nan if evaluation is None else result[evaluation["measure"]]
    size: int = report["sizes"]["quantized_bytes"]
    # Each figure is looked up only where its gate was asked for, as not every kind of model has it.
    found: dict[str, Callable[[], float]] = {
        "target_kl": lambda: shipped.selection,
        "max_kl": lambda: divergence,
        "max_kl_p99": lambda: result["kl_p99"],
        "max_flips": lambda: result.get("flips", math.nan),
        "max_ppl_increase": lambda: result.get("perplexity", math.inf) / original.get("perplexity", math.inf) - 1,
        "min_same_top": lambda: result["same_top"],
        "max_task_drop": lambda: max(0.0 - result["difference"] for result in report["tasks"]),
        "max_size": lambda: size,
        "max_fallbacks": lambda: report["fallbacks"],
        "max_kept": lambda: report["kept"]["share"],
    }
    gates = []
    for name, figure in found.items():
        limit = getattr(config, name)
        if limit is not None:
            limit = parse_size(limit) if name == "max_size" else limit
            gates.append(judge(name, limit, figure(), *((AT_LEAST,) if name == "min_same_top" else ())))
    if baseline is not None and config.max_regression is not None:
        now = {"divergence": divergence, "perplexity": result.get("perplexity", math.inf), "size": size}
        gates += [
            judge_change(f"regression_{name}", before, config.max_regression, now[name])
            for name, before in baseline.values.items()
        ]
    return gates
