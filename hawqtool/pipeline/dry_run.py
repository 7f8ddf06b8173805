"""What a run would do, from headers alone."""

from __future__ import annotations

from pathlib import Path

from hawqtool.allocation.problem import achievable, reach_text
from hawqtool.allocation.uniform import best_uniform
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.export.manifest import unlisted_files
from hawqtool.pipeline.run.files import REPORT_SCHEMA
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.run.menu import budget_bytes, job_menu, second_budget, unquantized_bytes
from hawqtool.pipeline.search.estimate import estimate
from hawqtool.pipeline.search.gates import check_gates
from hawqtool.pipeline.search.planner import check_saved_scores, given_plan, single_choice_plan
from hawqtool.pipeline.search.selection import largest_special
from hawqtool.pipeline.stages.report import is_our_folder, kept_record
from hawqtool.pipeline.stages.rows import check_calibration, check_sources
from hawqtool.pipeline.stages.write import target_config
from hawqtool.pipeline.tasks import check_tasks
from hawqtool.records import Menu
from hawqtool.report.documents import DryRun
from hawqtool.report.wording import rows_name
from hawqtool.runtime.reporter import Reporter


def dry_run(config: RunConfig, reporter: Reporter) -> DryRun:
    """``hawqtool quantize --dry-run``: what a run would do, after refusing what it would refuse.

    Rows of texts on this machine are cut; nothing is fetched but the model, and nothing is sampled.

    Raises:
        HawqError: As the run would, before its work.
    """
    if config.output is not None:
        check_free(config, output_folder(config))
    job = prepare(config, reporter)
    check_tasks(job)
    description = describe(job)
    check_sources(job)
    return {**description, "estimate": estimate(job)}


def output_folder(config: RunConfig) -> Path:
    """Where the output goes: a link to a folder is followed.

    Raises:
        UsageError: If nothing can be put there by a rename at the end.
    """
    if config.output is None:
        raise UsageError("--output is needed: the folder to create")
    if config.output.endswith(".gguf"):
        raise UsageError(f"--output {config.output} is the name of a GGUF file; add --to gguf, or name a folder")
    try:
        output = Path(config.output).resolve()
    except (OSError, RuntimeError) as error:  # links that lead to themselves, names that are too long
        raise UsageError(f"--output {config.output} cannot be used ({error}); choose another folder") from error
    if not output.parent.is_dir():
        raise UsageError(f"the parent folder of {config.output} does not exist; create it first")
    if output.is_mount():
        raise UsageError(
            f"{config.output} is a mount point, which a finished folder cannot replace; name a folder inside it"
        )
    return output


def check_free(config: RunConfig, output: Path) -> None:
    """Check that the output does not exist, is empty, or may be replaced: all in it is ours, and the model is not.

    Raises:
        UsageError: Otherwise.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not config.overwrite:
        raise UsageError(f"{config.output} exists and is not empty; choose another folder or give --overwrite")
    model = Path(config.model)
    if model.exists() and model.resolve().is_relative_to(output):
        raise UsageError(
            f"{config.model} lies in {config.output}, which --overwrite would remove with the model; choose another "
            "--output"
        )
    if not is_our_folder(output):
        raise UsageError(
            f"{config.output} has no report.json of schema {REPORT_SCHEMA}, so it was not made by hawqtool and "
            "--overwrite leaves it alone; choose another folder"
        )
    strange = unlisted_files(output)
    if strange:
        raise UsageError(
            f"{config.output} holds {strange[0]}, which hawqtool did not write and --overwrite would remove; move it "
            "away, or choose another folder"
        )


def describe(job: Job) -> DryRun:
    """Model, menu, achievable range, budget and expected size; reads nothing but headers.

    Raises:
        UsageError: If the budget is infeasible, or settings contradict each other.
    """
    _check_settings(job)
    config = job.config
    weights = sum(unit.num_weights for unit in job.units)
    menu = job_menu(job, None)
    fixed = unquantized_bytes(job, menu)
    budget, plan = None, None
    if config.plan is not None:
        plan = given_plan(config, job.units)
    elif config.target_kl is None:
        budget = budget_bytes(config, job.units, fixed, job.pins)
        menu = job_menu(job, budget)
        _check_feasible(job, menu, budget, weights, fixed)
        second_budget(config, job.units, menu, job.pins)  # what it lacks must be known before the long part
        plan = single_choice_plan(job.units, menu, job.pins, budget, config)
    if plan is None:
        check_saved_scores(job, menu)
    target_config(job, {unit.name: menu[unit.name][0] for unit in job.units})  # what engines cannot tell apart
    lowest, highest = achievable(job.units, menu, job.pins)
    expected = plan.stored_bytes if plan else highest if budget is None else min(budget, highest)
    symmetric = plan.symmetric if plan else config.symmetric
    uniform = _best_uniform(job, expected if budget is None else budget, symmetric)
    length = rows_name(job.row_format.kind, job.settings.seq_len)
    return {
        "model": job.source.spec,
        "source_format": job.index.source_format,
        "left_unquantized": [unit.name for unit in job.left_units],
        "blocks": len(job.structure.blocks),
        "linears": sum(len(unit.members) for unit in job.units),
        "units": len(job.units),
        "quantized_weights": weights,
        "widths": sorted({f.bits for formats in menu.values() for f in formats}),
        "menu": [f.label for f in sorted({f for formats in menu.values() for f in formats})],
        "symmetric": symmetric,
        "kept": kept_record(job),
        "group_falls": _group_falls(job, menu),
        "achievable_bpw": [8 * lowest / weights, 8 * highest / weights],
        "target_kl": config.target_kl,
        "budget_bpw": None if budget is None else 8 * budget / weights,
        "original_bytes": job.index.total_bytes,
        "expected_bytes": job.layout(plan.formats).total_bytes if plan else fixed + expected,
        "expected_is_exact": plan is not None,
        "best_uniform": uniform,
        "uniform_bits": config.uniform_width,
        "uniform_format": config.uniform_format.label if config.uniform_format else None,
        "device": str(job.device),
        "calibration": f"{job.settings.num_samples} {length}" if config.reads_rows else "no data",
        "evaluation": _evaluation(job, length),
        "rounding": ", ".join([config.rounding, *["output feedback"] * bool(job.feedback_layers), *_learning(job)]),
        "rotation": job.rotation,
        "kv_cache": _kv_cache(job),
        "seed": config.seed,
    }


def _kv_cache(job: Job) -> str | None:
    """Format of the KV cache, and what a token takes."""
    if not job.caches:
        return None
    count = sum(attention.cached_values for attention in job.caches)
    return f"{job.config.kv_cache}, {count:,} bytes a token ({2 * count:,} in 16 bits)"


def _check_settings(job: Job) -> None:
    """Refuse settings that contradict each other or the model."""
    check_calibration(job)
    check_gates(job)
    if job.config.sensitivity_steps and not job.config.refine_steps:
        raise UsageError(
            "--sensitivity-steps scores roundings as --refine-steps leaves them, which is 0; give both, or drop it"
        )


def _best_uniform(job: Job, limit: int, symmetric: bool) -> str | None:
    """Label of the largest uniform plan within so many bytes."""
    if job.config.special_formats:
        found = largest_special(job, limit)
        return None if found is None else found[0].removeprefix("uniform ")
    uniform = best_uniform(job.units, limit, symmetric, job.config.group_sizes)
    return uniform.label if uniform else None


def _evaluation(job: Job, length: str) -> str:
    """On what the result is judged, and how to have less or more of it."""
    if not job.config.evaluates:
        return "nothing (--eval measures the quality)"
    return f"{job.settings.eval_samples} {length} (--eval-samples for more or fewer, --no-eval for none)"


def _learning(job: Job) -> list[str]:
    config = job.config
    gram = "Gram steps where there is no feedback" if job.feedback_layers else "Gram steps"
    distillation = "distillation steps on codes too" if config.distill_codes else "distillation steps"
    refinement = "refinement steps" if config.refine_learner == "adam" else "annealed refinement steps"
    kinds = (gram, config.gram_steps), (refinement, config.refine_steps), (distillation, config.distill_steps)
    return [f"{steps} {kind}" for kind, steps in kinds if steps]


def _check_feasible(job: Job, menu: Menu, budget: int, weights: int, fixed: int) -> None:
    lowest, highest = achievable(job.units, menu, job.pins)
    original = sum(member.num_weights * member.scale_bytes for unit in job.units for member in unit.members)
    if job.config.target_bpw is not None and 0 < original <= budget:
        raise UsageError(
            f"target of {job.config.target_bpw:g} bits per weight is no less than the original's "
            f"{8 * original / weights:g}; the widths reach {8 * highest / weights:.3f}; lower the target"
        )
    if budget < lowest:
        target = f"{8 * budget / weights:.3f} bits per weight ({budget + fixed:,} bytes in all)"
        if budget < 0:
            target = f"{budget + fixed:,} bytes, while {fixed:,} stay as they are,"
        raise UsageError(
            f"target of {target} is below what the widths allow: {reach_text(lowest, highest, weights, fixed)}; raise "
            "the target, add narrower --bits or a larger --group-size, or drop pins"
        )


def _group_falls(job: Job, menu: Menu) -> list[str]:
    wanted = job.config.base_group_size
    if job.config.formats is not None or (job.config.chooses_groups and job.config.uniform_width is None):
        return []  # the menu has what divides
    fallen = [u.name for u in job.units if menu[u.name][0].group_size != wanted]
    if not fallen:
        return []
    sizes = sorted({menu[name][0].group_size for name in fallen})
    return [f"group size {wanted} does not divide {len(fallen)} units (first {fallen[0]}); they use {sizes}"]
