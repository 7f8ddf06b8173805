"""Estimate of a run before it: seconds of each phase, peak memory, disk, from headers and rates measured at once."""

from __future__ import annotations

import math

import torch

from hawqtool.model.inputs.arguments import row_positions
from hawqtool.model.skeleton import token_embedding
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.memory_budget import Work
from hawqtool.pipeline.run.menu import budget_bytes, job_menu, unquantized_bytes
from hawqtool.pipeline.search.gradient_swap import REACH, SHARES
from hawqtool.pipeline.search.rates import Rates, measured_rates
from hawqtool.pipeline.search.width_swap import neighbouring
from hawqtool.pipeline.stages.refine import BATCH_ROWS
from hawqtool.pipeline.stages.rows import SELECTION_LENGTH, sampled_tokens, used_rows
from hawqtool.report.documents import Estimate, Phase

_BACKWARD, _ORIGINAL_TOO = 3, 2
"""Forward passes that a pass backwards costs with the one that it repeats, and that rounding makes of each row."""
_EFFICIENCY = 0.6
"""Share of the rate of large products that a forward pass reaches."""
_SAMPLING = 0.15
"""The same of sampling, which multiplies by few rows at a time."""
_COMPARED = 1
"""Plans beside the short list that a layerwise comparison has: uniform."""
_PROOF_SWEEPS = 4
"""Times that all weights are read to prove a rotation, which has no phase of its own."""
_ANNEALING = {"cpu": 3000, "cuda": 50_000}
"""Operations that an annealed weight's step could be exchanged for, its product aside."""
_LIBRARIES = 700_000_000
"""Bytes of the process before it has any tensor."""
_HASHED_PER_SECOND = 1e9
_FIXED = {"cpu": 15.0, "cuda": 4.0}
"""Seconds of loading the result once in another process, reading it back, and drawing the page; of a run on a GPU most
of that is done by then."""
_LAUNCHING = {
    "token importance": 0.15,
    "forward sweep": 0.05,
    "reverse sweep": 0.2,
    "evaluating": 0.03,
    "comparing": 0.03,
    "round": 0.25,
}
"""Seconds that the host of a GPU takes to launch the work of a block, by the beginning of a phase's name: SmolLM2's on
an H200."""


def estimate(job: Job) -> Estimate:
    """What a run takes: an order of magnitude, mostly right within a factor of two."""
    phases = [Phase(name="fingerprint", seconds=job.index.total_bytes / _HASHED_PER_SECOND)]
    for name, seconds in _work(job, measured_rates(job)):
        phases.append(Phase(name=name, seconds=seconds + _launching(job, name)))
    phases.append(Phase(name="checking", seconds=_FIXED[job.device.type]))
    return {
        "phases": phases,
        "seconds": sum(phase["seconds"] for phase in phases),
        "memory_bytes": _memory(job),
        "disk_bytes": _disk(job),
    }


def _launching(job: Job, phase: str) -> float:
    """Seconds that launches of a phase take, whatever their size."""
    if job.device.type != "cuda":
        return 0.0
    a_block = next((seconds for begin, seconds in _LAUNCHING.items() if phase.startswith(begin)), 0.0)
    return a_block * len(job.structure.blocks)


def _work(job: Job, rates: Rates) -> list[tuple[str, float]]:
    """Seconds of each phase in the order of the run, by the beginning of what it is called in the progress."""
    config, settings, rows = job.config, job.settings, used_rows(job)
    length = row_positions(job.skeleton, settings.seq_len)
    weights = sum(linear.num_weights for spec in job.structure.blocks for linear in spec.linears)
    embedding = token_embedding(job.skeleton)
    head = math.prod(embedding) if job.task.logits and embedding is not None else 0
    second = rates.operations * _EFFICIENCY
    forward, outputs = 2 * weights * length / second, 2 * head * length / second
    loading = job.index.total_bytes / rates.read
    calibrating, choosing = rows.get("calibration", 0), rows.get("selection", 0) * min(1.0, SELECTION_LENGTH / length)
    judged = choosing + rows.get("report", 0)
    menu = job_menu(job, None if config.target_kl or config.plan else _budget(job))
    choices = 0 if config.plan else sum(len(menu[unit.name]) for unit in job.units if unit.name not in job.pins)
    measured = config.measures and choices > len(job.units) - len(job.pins)
    rounding = sum(unit.num_weights for unit in job.units) / rates.rounded
    streams = _ORIGINAL_TOO + settings.method.needs_drift
    plan = streams * forward * calibrating + rounding + loading * (1 + settings.method.needs_drift)
    batch = min(BATCH_ROWS[job.device.type], calibrating)  # a step of distillation runs each block once more
    plan += batch * config.refine_steps * _BACKWARD * forward
    plan += batch * config.distill_steps * (1 + _BACKWARD) * (forward + outputs)
    plan += config.gram_steps * _gram_operations(job) / second
    found: list[tuple[str, float]] = []
    written = sampled_tokens(job)
    if written:
        found.append(("sampling", loading + written / length * forward / _SAMPLING))
    if settings.uses_token_importance and calibrating:
        importance = calibrating * (forward * (1 + _BACKWARD) + outputs * _BACKWARD)
        proof = 0 if job.index.rotation is None else _PROOF_SWEEPS * loading
        found.append(("token importance", proof + 2 * loading + importance))
    if measured:
        formats = choices / max(1, len(job.units))
        found.append(("forward sweep", loading + rows.get("scoring", 0) * forward + formats * rounding))
        backward = rows.get("scoring", 0) * (forward * _BACKWARD + outputs * _BACKWARD)
        found.append(("reverse sweep", loading + backward))
    if judged:
        found.append(("evaluating the original model", loading + judged * forward))
    if measured and _by_gradient(job):
        sweep = rows.get("scoring", 0) * (forward * (1 + 2 * _BACKWARD) + outputs * (1 + _BACKWARD))
        judging = len(SHARES) * (loading + choosing * forward)
        found.append(("swaps, every format", 2 * loading + calibrating * forward + _swap_formats(job) * rounding))
        found.append(("swaps, gradient", settings.swaps * (2 * loading + sweep + judging)))
    if measured and job.settings.proof == "layerwise":
        formats = min(_COMPARED + settings.shortlist, choices / max(1, len(job.units)))
        walks = (calibrating + (_COMPARED + settings.shortlist) * choosing) * forward
        found.append(("comparing plans", loading + walks + formats * rounding))
    for _ in range(_plans(job, measured)):
        found.append(("round", plan))
        if judged:
            found.append(("evaluating", judged * (forward + 2 * outputs)))
    return found


def _gram_operations(job: Job) -> float:
    """Operations of a step of learning from Gram matrices: products, and what passes over the memory count as."""
    linears = [linear for spec in job.structure.blocks for linear in spec.linears]
    return float(sum(n.num_weights * (2 * n.in_features + _ANNEALING[job.device.type]) for n in linears))


def _budget(job: Job) -> int:
    return budget_bytes(job.config, job.units, unquantized_bytes(job, job_menu(job, None)), job.pins)


def _plans(job: Job, measured: bool) -> int:
    """Plans that are rounded: the short list, swaps, and the largest uniform one."""
    if not measured or not job.config.evaluates or job.settings.proof == "layerwise":
        return 1
    if job.config.target_kl is not None:
        return 7
    return job.settings.shortlist + (1 if _by_gradient(job) else job.settings.swaps) + 1


def _by_gradient(job: Job) -> bool:
    """Whether there are swaps by gradient."""
    return bool(job.settings.swaps) and job.config.swap_scores == "gradient" and job.config.plan is None


def _swap_formats(job: Job) -> float:
    """Formats, the most of them, that each unit is rounded in for swaps by gradient."""
    whole = job_menu(job, None)
    middle = {unit: sorted(formats)[len(formats) // 2] for unit, formats in whole.items()}
    menu = neighbouring(whole, middle, set(), REACH)
    return sum(map(len, menu.values())) / max(1, len(menu))


def _stored_roundings(job: Job) -> int:
    """Bytes of the roundings that swaps by gradient keep; formats are about as large as the plan's own."""
    return int(_swap_formats(job) * _budget(job)) if _by_gradient(job) else 0


def _memory(job: Job) -> int:
    """Most bytes of the device: one block's work, the hidden states of all rows, and what the libraries take."""
    settings, rows = job.settings, used_rows(job)
    size = torch.finfo(job.dtype).bits // 8
    length = row_positions(job.skeleton, settings.seq_len) if rows else 0
    method = settings.method
    work = Work(
        job.config, job.index, job.structure, job.device, job.dtype, max(rows.values(), default=1), length,
        method.needs_drift,
    )  # fmt: skip
    width = max((linear.in_features for spec in job.structure.blocks for linear in spec.linears[:1]), default=0)
    states = sum(rows.values()) * length * width * size * (1 + method.needs_drift)
    states += _stored_roundings(job)
    return work.needed_bytes(settings.batch_size) + states + (_LIBRARIES if job.device.type == "cpu" else 0)


def _disk(job: Job) -> int:
    """Most bytes beside the model: the plans that lie there at a time, each as large as the result."""
    menu = job_menu(job, None)
    largest = job.layout({unit: max(formats) for unit, formats in menu.items()}).total_bytes
    fixed = unquantized_bytes(job, menu)
    one = largest if job.config.target_kl or job.config.plan else min(largest, fixed + _budget(job))
    spilled = 0 if job.offload is None else max(0, _stored_roundings(job) - job.offload.memory_bytes)
    return one * (1 if job.config.is_uniform or not job.config.evaluates else 3) + spilled
